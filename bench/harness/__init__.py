"""What every measurement needs: clocks, memory, rows in files, the checkout."""
