"""One optimiser step, in order: images, rows, gradients, balance; and what is known of the signals."""
