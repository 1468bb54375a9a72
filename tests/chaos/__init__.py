"""The judge: does every accepted event reach its room once and in order, whatever breaks? See README.md here."""
