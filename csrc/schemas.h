// Every operator's schema. Fake kernels and autograd are in pointcmt/ops/.
#pragma once

#include <torch/library.h>

namespace pointcmt {

inline void define_schemas(torch::Library& m) {
  // emd
  m.def(
      "emd(Tensor x, Tensor y, float tolerance, int max_rounds) -> "
      "(Tensor distance, Tensor bound, Tensor assignment, Tensor statistics)");
  // sampling
  m.def("furthest_point_sample(Tensor xyz, SymInt npoint, Tensor? lengths=None) -> Tensor");
  m.def("voxel_subsample(Tensor points, float size) -> (Tensor kept, Tensor inverse)");
  // neighbors
  m.def("ball_query(float radius, SymInt nsample, Tensor xyz, Tensor new_xyz, Tensor? lengths=None) -> Tensor");
  m.def("knn(Tensor queries, Tensor points, SymInt k, Tensor? lengths=None) -> (Tensor, Tensor)");
  m.def("three_nn(Tensor unknown, Tensor known, Tensor? lengths=None) -> (Tensor, Tensor)");
  // grouping
  m.def("gather_points(Tensor features, Tensor idx) -> Tensor");
  m.def("gather_points_backward(Tensor grad, Tensor idx, SymInt n) -> Tensor");
  m.def("group_points(Tensor features, Tensor idx) -> Tensor");
  m.def("group_points_backward(Tensor grad, Tensor idx, SymInt n) -> Tensor");
  m.def("group_relative(Tensor xyz, Tensor new_xyz, Tensor idx, Tensor? features) -> Tensor");
  m.def("group_relative_backward(Tensor grad, Tensor idx, SymInt n, bool coordinates) -> (Tensor, Tensor, Tensor)");
  m.def("three_interpolate(Tensor features, Tensor idx, Tensor weight) -> Tensor");
  m.def("three_interpolate_backward(Tensor grad, Tensor idx, Tensor weight, SymInt m) -> Tensor");
  m.def("three_interpolate_weight_backward(Tensor grad, Tensor features, Tensor idx) -> Tensor");
  // edges
  m.def(
      "norm_act_max(Tensor x, Tensor? centres, Tensor? idx, Tensor weight, Tensor bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, float slope) -> "
      "(Tensor out, Tensor chosen, Tensor which, Tensor total, Tensor mean, Tensor var)");
  m.def(
      "norm_act_max_backward(Tensor grad, Tensor x, Tensor? centres, Tensor? idx, Tensor weight, Tensor bias, "
      "Tensor chosen, Tensor which, Tensor total, Tensor mean, Tensor var, float eps, float slope, "
      "bool training) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace pointcmt
