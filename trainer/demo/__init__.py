"""The whole recipe in miniature, on made-up medicine."""
