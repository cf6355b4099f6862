// fastlora._core: host objects that a test, a benchmark or a tuning sweep wants to hold in Python.
// The package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "plan/few.h"
#include "plan/plan.h"
#include "plan/share.h"

namespace py = pybind11;
using namespace fastlora;

namespace {

template <class T>
std::string printed(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTLORA_VERSION;
  info["archs"] = py::str(FASTLORA_ARCHS).attr("split")();
  info["compiler"] = __VERSION__;
  info["cplusplus"] = __cplusplus;
  info["python"] = PY_VERSION;
  info["pybind11"] = printed(PYBIND11_VERSION_MAJOR) + "." + printed(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "How fastlora cuts a product into tiles, and how this binary was built.";

  py::class_<Problem>(m, "Problem",
                      "y [m, n] = x [m, k] W^T + h [m, rank] B^T on a GPU of num_sms SMs.")
      .def(py::init(
               [](int64_t m, int64_t n, int64_t k, int64_t rank, std::string dtype, int num_sms) {
                 Problem problem{m, n, k, rank, std::move(dtype), num_sms};
                 problem.validate();
                 return problem;
               }),
           py::arg("m"), py::arg("n"), py::arg("k"), py::arg("rank") = 0,
           py::arg("dtype") = "bfloat16", py::arg("num_sms") = 132)
      .def_readonly("m", &Problem::m)
      .def_readonly("n", &Problem::n)
      .def_readonly("k", &Problem::k)
      .def_readonly("rank", &Problem::rank)
      .def_readonly("dtype", &Problem::dtype)
      .def_readonly("num_sms", &Problem::num_sms)
      .def("__repr__", &printed<Problem>);

  py::class_<TileConfig>(m, "TileConfig", "One way to cut a Problem; to_list() is what ops take.")
      .def_readonly("block_m", &TileConfig::block_m)
      .def_readonly("block_n", &TileConfig::block_n)
      .def_readonly("stages", &TileConfig::stages)
      .def_readonly("cluster_m", &TileConfig::cluster_m)
      .def_readonly("cluster_n", &TileConfig::cluster_n)
      .def_readonly("split_k", &TileConfig::split_k)
      .def_readonly("group_m", &TileConfig::group_m)
      .def_property_readonly("shared_memory", &TileConfig::shared_memory, "Bytes one CTA uses.")
      .def("to_list", &TileConfig::to_list)
      .def_static("from_list", &TileConfig::from_list, py::arg("list"),
                  "The inverse of to_list(); ValueError for what no kernel can run.")
      .def("__eq__", &TileConfig::operator==, py::is_operator())
      .def("__hash__",
           [](const TileConfig& c) { return py::hash(py::tuple(py::cast(c.to_list()))); })
      .def("__repr__", &printed<TileConfig>);

  m.def("plan", &plan, py::arg("problem"), "The configuration predicted to be the fastest.");
  m.def("candidates", &candidates, py::arg("problem"), "Every sensible configuration, best first.");
  m.def("estimate", py::overload_cast<const Problem&, const TileConfig&>(&estimate),
        py::arg("problem"), py::arg("config"), "Predicted SM clocks.");
  py::class_<LinearWork>(m, "LinearWork", "The passes of a low-rank linear, in elements.")
      .def(py::init([](int clusters, int64_t tiles, int64_t k, int64_t row_groups, int64_t down,
                       int64_t wgrad_b, int64_t wgrad_a) {
             return LinearWork{clusters, tiles, k, row_groups, down, wgrad_b, wgrad_a};
           }),
           py::kw_only(), py::arg("clusters"), py::arg("tiles"), py::arg("k"),
           py::arg("row_groups"), py::arg("down"), py::arg("wgrad_b") = 0, py::arg("wgrad_a") = 0);
  py::class_<Share>(m, "Share", "Who makes them.")
      .def(py::init<int, bool, double>(), py::arg("helpers"), py::arg("b_early") = false,
           py::arg("a_early") = 0)
      .def_readonly("helpers", &Share::helpers)
      .def_readonly("b_early", &Share::b_early)
      .def_readonly("a_early", &Share::a_early);
  m.def("share_work", &share_work, py::arg("work"), "The share predicted to be the fastest.");
  m.def("estimate", py::overload_cast<const LinearWork&, const Share&>(&estimate), py::arg("work"),
        py::arg("share"), "Predicted us on an H200.");
  py::class_<FewWork>(m, "FewWork", "A linear of few rows.")
      .def(py::init([](int64_t m, int64_t n, int64_t k, int64_t rank, int num_sms) {
             return FewWork{m, n, k, rank, num_sms};
           }),
           py::arg("m"), py::arg("n"), py::arg("k"), py::arg("rank") = 16,
           py::arg("num_sms") = 132);
  py::class_<FewConfig>(m, "FewConfig", "How it is cut; ops take the three as a list.")
      .def(py::init<int, int, int>(), py::arg("columns"), py::arg("cluster_m"), py::arg("splits"))
      .def_readonly("columns", &FewConfig::columns)
      .def_readonly("cluster_m", &FewConfig::cluster_m)
      .def_readonly("splits", &FewConfig::splits);
  m.def("plan_few", &plan_few, py::arg("work"), "The configuration predicted to be the fastest.");
  m.def("estimate", py::overload_cast<const FewWork&, const FewConfig&>(&estimate), py::arg("work"),
        py::arg("config"), "Predicted us on an H200.");
  m.def("build_info", &build_info, "How this binary was built.");
}
