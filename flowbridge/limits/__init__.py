"""What one caller may take: shares of bounds, places, processor time; and which caller that is."""
