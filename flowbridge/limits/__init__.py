"""What one caller may take: shares of bounds, places, processor time; and who that caller is."""
