"""Text in and out: tokenizer, incremental detokenizer, stop strings, chat template."""
