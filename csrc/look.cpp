// Looks at parameters, their gradients and state: addresses, and whether a gradient lies as its parameter does.
//
// From Python that is ten attribute reads per parameter and step. Here tensors are read through the table of C functions
// that DLPack has every framework publish (`__dlpack_c_exchange_api__`), whose layout is fixed, and attributes through
// the C functions behind them; still nothing of torch is included. Whatever is out of the ordinary is left to Python.

#include "look.h"

#include <structmember.h>  // PyMemberDef, before Python 3.12

#include "nexus_math.h"

namespace py = pybind11;
using nexus::pointer;

namespace {

// DLPack 1.x, as its specification lays it out.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocator, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
};

constexpr uint8_t kFloat = 2, kBfloat = 4;  // DLDataTypeCode

PyTypeObject *tensor_type, *parameter_type;
const DLPackExchangeAPI* api;
PyGetSetDef* grad_attribute;
PyCFunction is_neg;

PyTypeObject* dtensor_type;  // null until there is one
Py_ssize_t local_offset, spec_offset;

PyGetSetDef* attribute(const py::object& type, const char* name) {
  const py::object found = type.attr(name);
  return Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type) ? reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset
                                                      : nullptr;
}

// Whether look() works with this PyTorch; it must have been called once, before.
bool prepare_to_look(const py::object& tensor, const py::object& parameter) {
  const py::object method = tensor.attr("is_neg");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__") || !Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) return false;
  const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) {
    PyErr_Clear();  // no such table under that name
    return false;
  }
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  grad_attribute = attribute(tensor, "grad");
  is_neg = definition->ml_flags == METH_NOARGS ? definition->ml_meth : nullptr;
  return api->major == 1 && api->tensor_from_object && grad_attribute && is_neg;
}

// Where an object of a type with __slots__ keeps one of them; 0 if it does not.
Py_ssize_t slot(const py::object& type, const char* name) {
  const py::object found = py::getattr(type, name, py::none());
  if (!Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type)) return 0;
  return reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member->offset;
}

// Has look() see through DTensors, if this PyTorch keeps their parts where it knows; else they are left to Python.
void prepare_to_look_at_dtensors(const py::object& type) {
  local_offset = slot(type, "_local_tensor");
  spec_offset = slot(type, "_spec");
  if (local_offset && spec_offset) dtensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
}

py::object get(PyObject* object, const PyGetSetDef* attribute) {
  PyObject* value = attribute->get(object, attribute->closure);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

PyObject* at(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

bool is_dtensor(PyObject* object) { return dtensor_type && Py_IS_TYPE(object, dtensor_type); }

// This process's part of a DTensor, any other tensor as it is.
PyObject* part_of(PyObject* tensor) { return is_dtensor(tensor) ? at(tensor, local_offset) : tensor; }

// Whether two tensors are both DTensors, spread alike over one mesh, or neither is one. FSDP2 gives a gradient the very
// description of its parameter.
bool spread_alike(PyObject* a, PyObject* b) {
  if (!is_dtensor(a) || !is_dtensor(b)) return !is_dtensor(a) && !is_dtensor(b);
  PyObject *one = at(a, spec_offset), *other = at(b, spec_offset);
  const int equal = one == other ? 1 : one && other ? PyObject_RichCompareBool(one, other, Py_EQ) : 0;
  if (equal < 0) throw py::error_already_set();
  return equal;
}

bool read(PyObject* object, DLTensor& out) {
  if (!object || (!Py_IS_TYPE(object, tensor_type) && !Py_IS_TYPE(object, parameter_type))) return false;
  if (api->tensor_from_object(object, &out) == 0) return true;
  PyErr_Clear();  // sparse, for example
  return false;
}

int64_t address(const DLTensor& t) { return reinterpret_cast<int64_t>(t.data) + int64_t(t.byte_offset); }

// The dtype's number, -1 for one that kernels cannot read.
int64_t dtype_of(const DLTensor& t) {
  using nexus::DType;
  if (t.code == kBfloat && t.bits == 16) return int64_t(DType::bfloat16);
  if (t.code != kFloat) return -1;
  return t.bits == 64 ? int64_t(DType::float64) : t.bits == 32 ? int64_t(DType::float32)
         : t.bits == 16 ? int64_t(DType::float16) : -1;
}

// Whether two tensors are on one device, and element i of one belongs to element i of the other in memory.
bool alike(const DLTensor& a, const DLTensor& b, int64_t length) {
  if (a.device_type != b.device_type || a.device_id != b.device_id || a.ndim != b.ndim) return false;
  int64_t numel = 1;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.strides[d] != b.strides[d])) return false;
    numel *= a.shape[d];
  }
  return numel == length;
}

bool negated(PyObject* tensor) {
  const py::object answer = py::reinterpret_steal<py::object>(is_neg(tensor, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Writes where gradients lie (0: there is none, -1: it has no elements) and their dtypes into the rows. Returns the rows
// that Python must look at itself, whether anything is another than before, and whether every row has a gradient.
//
// objects[i], ours: the last gradient that was asked whether it is negated, which costs as much as all the rest. It is not
// asked again at the same address, unless it has one element only: a dense one of several is negated by no public function
// (`imag` of a conjugate has gaps), and would have to come as an object at the place of the one before.
py::tuple look(const py::list& params, int64_t rows, bool use, int64_t objects) {
  py::list unusual;
  bool changed = false, complete = true;
  auto* row = pointer<nexus::Segment>(rows);
  auto* known = pointer<PyObject*>(objects);
  const Py_ssize_t n = PyList_GET_SIZE(params.ptr());
  for (Py_ssize_t i = 0; i < n; ++i, ++row, ++known) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    DLTensor own, gradient;
    int64_t found = 0, dtype = row->grad_dtype;
    if (!read(part_of(param), own) || address(own) != row->weight) {
      unusual.append(i);
    } else if (use) {
      const py::object grad = get(param, grad_attribute);
      if (!grad.is_none()) {
        PyObject* part = part_of(grad.ptr());
        bool fits = spread_alike(param, grad.ptr()) && read(part, gradient) && alike(gradient, own, row->length);
        if (fits) dtype = dtype_of(gradient);
        found = fits && row->length ? address(gradient) : -1;
        fits = fits && dtype >= 0 &&
               ((part == *known && found == row->grad && row->length > 1) || !negated(part));
        *known = fits ? part : nullptr;
        if (!fits) unusual.append(i), found = 0, dtype = row->grad_dtype;
      }
    }
    complete &= found != 0;
    changed |= found != row->grad || dtype != row->grad_dtype;
    row->grad = found, row->grad_dtype = dtype;
  }
  return py::make_tuple(unusual, changed, complete);
}

// Whether each entry has the tensor under its key that we put there, at the address where it was. A list of dicts, of
// str and of tensors, and the addresses.
bool unchanged(const py::list& entries, const py::list& keys, const py::list& tensors, int64_t addresses) {
  const auto* known = pointer<int64_t>(addresses);
  const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* ours = PyList_GET_ITEM(tensors.ptr(), i);
    PyObject* value = PyDict_GetItemWithError(PyList_GET_ITEM(entries.ptr(), i), PyList_GET_ITEM(keys.ptr(), i));
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    DLTensor found;
    if (value != ours || !read(part_of(ours), found) || address(found) != known[i]) return false;
  }
  return true;
}

// What autograd calls when a parameter has got a gradient: takes a function off a list, if there is one, and calls it.
PyObject* on_gradient(PyObject* armed, PyObject*) {
  if (PyList_GET_SIZE(armed) == 0) Py_RETURN_NONE;
  const py::object begin = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(armed, 0));
  if (PyList_SetSlice(armed, 0, 1, nullptr) < 0) return nullptr;
  return PyObject_CallNoArgs(begin.ptr());
}

PyMethodDef on_gradient_definition{"on_gradient", on_gradient, METH_O, nullptr};

py::object hook_of(const py::list& armed) {
  return py::reinterpret_steal<py::object>(PyCFunction_New(&on_gradient_definition, armed.ptr()));
}

}  // namespace

void define_look(py::module_& m) {
  m.def("prepare_to_look", &prepare_to_look);
  m.def("prepare_to_look_at_dtensors", &prepare_to_look_at_dtensors);
  m.def("look", &look);
  m.def("unchanged", &unchanged);
  m.def("hook_of", &hook_of);
}
