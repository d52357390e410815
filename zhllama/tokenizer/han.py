"""Han characters, as a character class of an expression has them: unified, their extensions, compatibility."""

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
