"""The words of the English-German grammar, by their English base form."""

from __future__ import annotations

from textenvs.tasks.translation.grammar import Modal, Noun, Preposition, Pronoun, Verb

NOUNS = {
    noun.english[0]: noun
    for noun in (
        Noun("person", "m", ("man", "men"), ("Mann", "Männer")),
        Noun("person", "f", ("woman", "women"), ("Frau", "Frauen")),
        Noun("person", "n", ("child", "children"), ("Kind", "Kinder")),
        Noun("person", "m", ("teacher", "teachers"), ("Lehrer", "Lehrer")),
        Noun("relative", "m", ("brother", "brothers"), ("Bruder", "Brüder")),
        Noun("relative", "f", ("sister", "sisters"), ("Schwester", "Schwestern")),
        Noun("relative", "m", ("friend", "friends"), ("Freund", "Freunde")),
        Noun("animal", "m", ("dog", "dogs"), ("Hund", "Hunde")),
        Noun("animal", "f", ("cat", "cats"), ("Katze", "Katzen")),
        Noun("animal", "m", ("bird", "birds"), ("Vogel", "Vögel")),
        Noun("animal", "n", ("horse", "horses"), ("Pferd", "Pferde")),
        Noun("food", "m", ("apple", "apples"), ("Apfel", "Äpfel")),
        Noun("food", "n", ("egg", "eggs"), ("Ei", "Eier")),
        Noun("food", "f", ("pear", "pears"), ("Birne", "Birnen")),
        Noun("text", "n", ("book", "books"), ("Buch", "Bücher")),
        Noun("text", "m", ("letter", "letters"), ("Brief", "Briefe")),
        Noun("text", "f", ("newspaper", "newspapers"), ("Zeitung", "Zeitungen")),
        Noun("thing", "m", ("ball", "balls"), ("Ball", "Bälle")),
        Noun("thing", "f", ("flower", "flowers"), ("Blume", "Blumen")),
        Noun("thing", "n", ("picture", "pictures"), ("Bild", "Bilder")),
        Noun("thing", "n", ("car", "cars"), ("Auto", "Autos")),
        Noun("place", "m", ("garden", "gardens"), ("Garten", "Gärten")),
        Noun("place", "n", ("house", "houses"), ("Haus", "Häuser")),
        Noun("place", "f", ("school", "schools"), ("Schule", "Schulen")),
        Noun("place", "f", ("city", "cities"), ("Stadt", "Städte")),
        Noun("place", "f", ("kitchen", "kitchens"), ("Küche", "Küchen")),
    )
}
PRONOUNS = {
    pronoun.english[0]: pronoun
    for pronoun in (
        Pronoun(("I", "me"), ("ich", "mich", "mir"), 0),
        Pronoun(("you", "you"), ("du", "dich", "dir"), 1),
        Pronoun(("he", "him"), ("er", "ihn", "ihm"), 2),
        Pronoun(("she", "her"), ("sie", "sie", "ihr"), 2),
        Pronoun(("we", "us"), ("wir", "uns", "uns"), 3),
        Pronoun(("they", "them"), ("sie", "sie", "ihnen"), 3),
    )
}
ADJECTIVES = {
    "small": "klein",
    "big": "groß",
    "old": "alt",
    "young": "jung",
    "clever": "klug",
    "tired": "müd",
    "friendly": "freundlich",
    "new": "neu",
    "beautiful": "schön",
    "expensive": "teur",
}
_OF_BEINGS = ("small", "big", "old", "young", "clever", "tired", "friendly")
_OF_THINGS = ("small", "big", "old", "new", "beautiful", "expensive")
ADJECTIVES_BY_KIND = {
    "person": _OF_BEINGS,
    "relative": _OF_BEINGS,
    "animal": _OF_BEINGS,
    "food": ("small", "big", "expensive"),
    "text": _OF_THINGS,
    "thing": _OF_THINGS,
    "place": _OF_THINGS,
}

PEOPLE, BEINGS, THINGS = "person relative", "person relative animal", "food text thing"
IN = Preposition("in", "in", "dative", "place")
INTO = Preposition("into", "in", "accusative", "place")
WITH = Preposition("with", "mit", "dative", PEOPLE)
FOR = Preposition("for", "für", "accusative", PEOPLE)
VERBS = {
    verb.english[0]: verb
    for verb in (
        Verb(("sleep", "sleeps"), ("schlafen", "schläfst", "schläft"), BEINGS, "", "", (IN,)),
        Verb(("work", "works"), ("arbeiten", "arbeitest", "arbeitet"), PEOPLE, "", "", (IN, WITH)),
        Verb(("play", "plays"), ("spielen", "spielst", "spielt"), BEINGS, "", "", (IN, WITH)),
        Verb(("go", "goes"), ("gehen", "gehst", "geht"), PEOPLE, "", "", (INTO,)),
        Verb(("run", "runs"), ("laufen", "läufst", "läuft"), BEINGS, "", "", (INTO,)),
        Verb(("see", "sees"), ("sehen", "siehst", "sieht"), BEINGS, f"{BEINGS} {THINGS}"),
        Verb(("love", "loves"), ("lieben", "liebst", "liebt"), PEOPLE, BEINGS),
        Verb(("look for", "looks for"), ("suchen", "suchst", "sucht"), BEINGS, f"{BEINGS} thing"),
        Verb(("find", "finds"), ("finden", "findest", "findet"), BEINGS, THINGS, "", (IN,)),
        Verb(("visit", "visits"), ("besuchen", "besuchst", "besucht"), PEOPLE, PEOPLE),
        Verb(("buy", "buys"), ("kaufen", "kaufst", "kauft"), PEOPLE, THINGS, "", (FOR,)),
        Verb(("eat", "eats"), ("essen", "isst", "isst"), BEINGS, "food", "", (IN, WITH)),
        Verb(("read", "reads"), ("lesen", "liest", "liest"), PEOPLE, "text", "", (IN,)),
        Verb(("help", "helps"), ("helfen", "hilfst", "hilft"), PEOPLE, "", BEINGS),
        Verb(("thank", "thanks"), ("danken", "dankst", "dankt"), PEOPLE, "", PEOPLE),
        Verb(("answer", "answers"), ("antworten", "antwortest", "antwortet"), PEOPLE, "", PEOPLE),
        Verb(("give", "gives"), ("geben", "gibst", "gibt"), PEOPLE, THINGS, PEOPLE),
        Verb(("show", "shows"), ("zeigen", "zeigst", "zeigt"), PEOPLE, THINGS, PEOPLE),
    )
}
MODALS = {
    modal.english[0]: modal
    for modal in (
        Modal(("can", "can"), ("cannot", "cannot"), ("kann", "kannst", "kann", "können")),
        Modal(
            ("must", "must"),
            ("do not have to", "does not have to"),
            ("muss", "musst", "muss", "müssen"),
        ),
        Modal(
            ("want to", "wants to"),
            ("do not want to", "does not want to"),
            ("will", "willst", "will", "wollen"),
        ),
        Modal(
            ("should", "should"),
            ("should not", "should not"),
            ("sollte", "solltest", "sollte", "sollten"),
        ),
    )
}
TIMES = {
    "today": "heute",
    "often": "oft",
    "sometimes": "manchmal",
    "every day": "jeden Tag",
    "in the evening": "am Abend",
    "on Monday": "am Montag",
}
