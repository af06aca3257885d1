// Which instruction set runs.
#pragma once

#include "call.h"

namespace quad {

// Returns the kernels of the chosen instruction set: that of `choose`, or the largest that the processor has; null where
// it has none.
const Kernels* chosen();

// Chooses by name; returns false if the processor or this library does not have it.
bool choose(const char* name);

// Returns the names of those that the processor has, the best first, separated by spaces.
const char* supported();

}  // namespace quad
