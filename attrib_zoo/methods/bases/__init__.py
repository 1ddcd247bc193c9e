"""What methods of one kind share: a base class each, with the hooks that a method implements."""
