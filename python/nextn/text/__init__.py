"""Text in and out: tokenizer, chat template, incremental detokenization, reasoning and tool calls. No torch."""
