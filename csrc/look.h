// See look.cpp.
#pragma once

#include <pybind11/pybind11.h>

void define_look(pybind11::module_& m);
