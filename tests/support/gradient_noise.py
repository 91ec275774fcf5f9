"""How far the noise of float32 gradients can carry a value: the tolerance of a golden trajectory, by entry.

Two programs for the same gradients (another compiler, another kind of CPU) differ by rounding: by about 1e-6
of the largest gradient of the matrix at every entry, also where the gradient is itself that small. Adam and
SM3 divide by the size of an entry's gradients, so that a value there is decided by noise. Nothing is known of
such an entry but what is bounded here; at all others the bound is far below the tolerance.

Let n bound the error of a step's gradient g at every entry, and write dx for the bound of the error of x.

Adam, m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, u = c m / (sqrt(v) + eps), c the bias corrections:
m is linear in the gradients, and sqrt(v) is a Euclidean norm of them, whose error the triangle inequality
bounds by the same norm of the errors. With s = sqrt(v):

    dm <- b1 dm + (1 - b1) n        ds^2 <- b2 ds^2 + (1 - b2) n^2
    u' - u = c (m' - m) / (s' + eps) + u (s - s') / (s' + eps)    and    s' >= s - ds, s' >= 0, so that
    du = (c dm + |u| ds) / (max(s - ds, 0) + eps)

A grown entry starts with m and s of the mean and the root mean square of its candidate's gradients, times
1 - b1^a and sqrt(1 - b2^a): dm and ds are n times these.

SM3, b = min(row, column) + g^2, row <- max b, column <- max b, u = g / sqrt(b + eps): maxima and minima do
not enlarge an error, and the sum is a norm again. So one number A bounds the errors of all sqrt(row) and
sqrt(column), and with s = sqrt(b + eps):

    A^2 <- A^2 + n^2
    du = (n + |u| A) / max(s - A, sqrt(eps))

Both: a value is (value - lr u) (1 - lr wd), so dvalue <- (dvalue + lr du) (1 - lr wd); 0 where grown. These
are bounds, not estimates to first order: they hold also where the noise is larger than the gradient.
"""

import numpy as np


class AdamNoise:
    """Bounds of the errors of one matrix, as arrays over all its entries.

    Args:
        size: Entries of the matrix.
        weight_decay: Weight decay.
        b1: Decay of the first moment.
        b2: Decay of the second.
        eps: Epsilon.
    """

    def __init__(self, size, *, weight_decay, b1, b2, eps):
        self.weight_decay, self.b1, self.b2, self.eps = weight_decay, b1, b2, eps
        self.value, self.first, self.root = np.zeros((3, size))

    def step(self, at, noise, lr, *, mu, nu, age):
        """An update of the entries ``at``; ``mu`` and ``nu`` are after it, ``age`` is what corrects them."""
        age = np.asarray(age, np.float64)
        root = np.sqrt(np.asarray(nu, np.float64))
        correction = np.sqrt(1 - self.b2**age) / (1 - self.b1**age)
        self.first[at] = self.b1 * self.first[at] + (1 - self.b1) * noise
        self.root[at] = np.sqrt(self.b2 * self.root[at] ** 2 + (1 - self.b2) * noise**2)
        update = correction * np.abs(mu) / (root + self.eps)
        error = correction * self.first[at] + update * self.root[at]
        error = error / (np.maximum(root - self.root[at], 0) + self.eps)
        self.value[at] = (self.value[at] + lr * error) * (1 - lr * self.weight_decay)

    def grow(self, at, noise, steps):
        """Entries that were grown, from candidates whose mean and root mean square are as noisy."""
        self.value[at] = 0
        self.first[at] = noise * (1 - self.b1**steps)
        self.root[at] = noise * np.sqrt(1 - self.b2**steps)


class SM3Noise:
    """As ``AdamNoise``, where the moments belong to the rows and columns."""

    def __init__(self, size, *, weight_decay, eps):
        self.weight_decay, self.eps = weight_decay, eps
        self.value = np.zeros(size)
        self.accumulator = 0.0

    def step(self, at, noise, lr, *, gradient, known):
        """An update of the entries ``at``; ``known`` is the smaller accumulator of each before it."""
        gradient = np.asarray(gradient, np.float64)
        root = np.sqrt(np.asarray(known, np.float64) + gradient**2 + self.eps)
        self.accumulator = np.hypot(self.accumulator, noise)
        error = noise + np.abs(gradient) / root * self.accumulator
        error = error / np.maximum(root - self.accumulator, np.sqrt(self.eps))
        self.value[at] = (self.value[at] + lr * error) * (1 - lr * self.weight_decay)

    def grow(self, at):
        """Entries that were grown."""
        self.value[at] = 0
