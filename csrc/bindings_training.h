#pragma once
#include <pybind11/pybind11.h>

// Adds the training kernels to the module.
void bind_training(pybind11::module_& m);
