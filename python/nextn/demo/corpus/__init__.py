"""Everything the embedded model reads: facts, templates, and the rule that keeps some of it for the quiz."""
