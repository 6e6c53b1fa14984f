"""What is measured, of cloaks and of victims."""
