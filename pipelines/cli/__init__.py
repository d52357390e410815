"""zhllama's commands, one module a subject: `add_to` declares them; each imports what it needs when it runs."""
