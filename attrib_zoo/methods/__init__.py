"""One paper per module, one final class each."""
