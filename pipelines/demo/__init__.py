"""`make demo`: the whole adaptation on this machine, at size `tiny`, on real Chinese text."""
