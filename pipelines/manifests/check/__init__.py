"""`zhllama check`: offline admission. What a cluster would refuse, or accept and regret, said before it is applied."""
