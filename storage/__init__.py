"""Files written whole or not at all, and pictures read from them. Imports none of the other packages."""
