"""Networks: loading them, their tokenizers, and the one way in which they score responses. No rank may enter."""
