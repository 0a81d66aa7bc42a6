// Adam (epsilon hat, the end of the paper's section 2) for dense gradients in one pass
// over memory: what a kernel of our own would gain. Used by `dense.py --native=native.so` alone; no part of the package. To build it:
//
//     flags() { python -c "import tensorflow as tf; print(*tf.sysconfig.get_$1_flags())"; }
//     g++ -w -std=c++17 -O3 -march=x86-64-v3 -fno-math-errno -fno-trapping-math \
//         -shared -fPIC native.cc -o native.so $(flags compile) $(flags link)
#include <cmath>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/util/work_sharder.h"

using namespace tensorflow;

REGISTER_OP("OnePassAdam")
    .Input("var: resource")
    .Input("m: resource")
    .Input("v: resource")
    .Input("grad: float")
    .Input("alpha: float")  // corrected for the bias of m and v
    .Input("beta_1: float")
    .Input("beta_2: float")
    .Input("epsilon: float")
    .SetIsStateful();

class OnePassAdam : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* c) override {
    core::RefCountPtr<Var> vars[3];
    float* x[3];
    for (int i = 0; i < 3; ++i) {
      OP_REQUIRES_OK(c, LookupResource(c, HandleFromInput(c, i), &vars[i]));
      x[i] = vars[i]->tensor()->flat<float>().data();
    }
    mutex_lock lock(*vars[0]->mu());
    float *theta = x[0], *m = x[1], *v = x[2];
    const float* grad = c->input(3).flat<float>().data();
    float s[4];
    for (int i = 0; i < 4; ++i) s[i] = c->input(4 + i).scalar<float>()();
    const float alpha = s[0], d1 = 1 - s[1], d2 = 1 - s[2], epsilon = s[3];
    auto share = [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float g = grad[i];
        m[i] += (g - m[i]) * d1;
        v[i] += (g * g - v[i]) * d2;
        theta[i] -= alpha * m[i] / (std::sqrt(v[i]) + epsilon);
      }
    };
    auto* threads = c->device()->tensorflow_cpu_worker_threads();
    Shard(threads->num_threads, threads->workers, c->input(3).NumElements(), 20, share);
  }
};

REGISTER_KERNEL_BUILDER(Name("OnePassAdam").Device(DEVICE_CPU), OnePassAdam);
