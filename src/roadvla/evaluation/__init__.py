"""Success in and out of distribution on numbered episodes, and what can be concluded from it."""
