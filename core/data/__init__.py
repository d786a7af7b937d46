"""Sets of pictures: where records come from, how they are checked, decoded, cached and served."""
