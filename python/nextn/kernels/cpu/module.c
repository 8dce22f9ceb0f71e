/* The Python module _cpu: the kernels for the processor it runs on. Every argument is an int (an address, 0 for none, or
   a size) or a float. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

typedef struct {
    const char *name;
    const Kernels *kernels;
} InstructionSet;

/* Raised here and in native.py when a kernel comes or goes, or its arguments or their meaning change. */
enum { INTERFACE = 1 };

enum { MAX_SETS = 3 };

/* Those that this processor has, the widest first; returns their number. */
static int supported(InstructionSet sets[MAX_SETS]) {
    int count = 0;
#if HAS_AVX
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[count++] = (InstructionSet){"avx512", &kernels_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets[count++] = (InstructionSet){"avx2", &kernels_avx2};
#endif
    sets[count++] = (InstructionSet){"any", &kernels_any};
    return count;
}

enum { MAX_ARGUMENTS = 16 };
typedef union {
    int64_t i;
    double f;
    void *p;
} Argument;

static int parse(const char *name, PyObject *const *args, Py_ssize_t found, Py_ssize_t expected, Argument *out) {
    if (found != expected) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, found %zd", name, expected, found);
        return -1;
    }
    for (Py_ssize_t i = 0; i < found; i++) {
        if (PyFloat_Check(args[i]))
            out[i].f = PyFloat_AS_DOUBLE(args[i]);
        else
            out[i].i = PyLong_AsLongLong(args[i]);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *done(int status) {
    if (status) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#define METHOD(name, count)                                                                                            \
    static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t found) {                              \
        Argument a[MAX_ARGUMENTS];                                                                                     \
        if (parse(#name, args, found, count, a)) return NULL;                                                          \
        return done(call_##name(*(const Kernels **)PyModule_GetState(self), a));                                       \
    }

static int call_linear(const Kernels *kernels, const Argument *a) {
    kernels->linear(a[0].p, a[1].p, a[2].i, a[3].p, a[4].p);
    return 0;
}
static int call_rms_norm(const Kernels *kernels, const Argument *a) {
    kernels->rms_norm(a[0].p, a[1].p, a[2].i, a[3].i, (float)a[4].f, a[5].p);
    return 0;
}
static int call_nextn_input(const Kernels *kernels, const Argument *a) {
    kernels->nextn_input(a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].i, a[6].i, (float)a[7].f, a[8].p);
    return 0;
}
static int call_fused_moe(const Kernels *kernels, const Argument *a) {
    return kernels->fused_moe(a[0].p, a[1].p, a[2].i, (int)a[3].i, a[4].p, a[5].i, a[6].i, a[7].p, a[8].p, a[9].p,
                              a[10].p);
}
static int call_route(const Kernels *kernels, const Argument *a) {
    return kernels->route(a[0].p, a[1].p, a[2].p, a[3].i, a[4].i, a[5].i, a[6].i, (int)a[7].i, (float)a[8].f, a[9].p,
                          a[10].p);
}
static int call_rope_and_cache(const Kernels *kernels, const Argument *a) {
    kernels->rope_and_cache(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].i, a[6].p, a[7].p, (float)a[8].f, a[9].p,
                            a[10].p, a[11].p, a[12].p, a[13].p, a[14].p);
    return 0;
}
static int call_paged_attention(const Kernels *kernels, const Argument *a) {
    return kernels->paged_attention(a[0].p, a[1].i, a[2].p, a[3].p, a[4].i, a[5].i, a[6].i, a[7].i, a[8].i, a[9].p, a[10].p,
                                    a[11].p, a[12].i, a[13].i, (float)a[14].f, a[15].p);
}

METHOD(linear, 5)
METHOD(rms_norm, 6)
METHOD(nextn_input, 9)
METHOD(fused_moe, 11)
METHOD(route, 11)
METHOD(rope_and_cache, 15)
METHOD(paged_attention, 16)

static PyMethodDef methods[] = {
    {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL, "weight, x, num_rows, residual, out"},
    {"rms_norm", (PyCFunction)(void (*)(void))py_rms_norm, METH_FASTCALL, "x, weight, num_rows, size, eps, out"},
    {"nextn_input", (PyCFunction)(void (*)(void))py_nextn_input, METH_FASTCALL,
     "ids, embedding, hidden, enorm, hnorm, num_tokens, size, eps, out"},
    {"fused_moe", (PyCFunction)(void (*)(void))py_fused_moe, METH_FASTCALL,
     "w13, w2, num_experts, has_shared, x, num_tokens, top_k, ids, weights, residual, out"},
    {"route", (PyCFunction)(void (*)(void))py_route, METH_FASTCALL,
     "gate, bias, x, num_tokens, top_k, n_group, topk_group, normalise, factor, weights, ids"},
    {"rope_and_cache", (PyCFunction)(void (*)(void))py_rope_and_cache, METH_FASTCALL,
     "qkv, num_tokens, num_heads, num_kv_heads, dim, half, q_norm, k_norm, eps, cos, sin, positions, slots, k, v"},
    {"paged_attention", (PyCFunction)(void (*)(void))py_paged_attention, METH_FASTCALL,
     "q, q_stride, k, v, num_heads, num_kv_heads, dim, page_size, num_seqs, starts, cu_seqlens_q, page_table, "
     "max_pages, first_key, scale, out"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", "Kernels for one CPU core.",
                                        sizeof(const Kernels *), methods, NULL, NULL, NULL, NULL};

static PyObject *module_of(const Kernels *kernels) {
    PyObject *module = PyModule_Create(&definition);
    if (module) *(const Kernels **)PyModule_GetState(module) = kernels;
    return module;
}

/* A module with the widest set's kernels, and a dict of one for every set. */
PyMODINIT_FUNC PyInit__cpu(void) {
    InstructionSet sets[MAX_SETS];
    int count = supported(sets);
    PyObject *module = module_of(sets[0].kernels), *by_name = PyDict_New();
    int failed = !module || !by_name;
    for (int i = 0; !failed && i < count; i++) {
        PyObject *one = module_of(sets[i].kernels);
        failed = !one || PyDict_SetItemString(by_name, sets[i].name, one);
        Py_XDECREF(one);
    }
    failed = failed || PyModule_AddObjectRef(module, "instruction_sets", by_name);
    failed = failed || PyModule_AddIntConstant(module, "interface", INTERFACE);
    Py_XDECREF(by_name);
    if (failed) Py_CLEAR(module);
    return module;
}
