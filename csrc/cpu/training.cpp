#include "training.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "engine.h"
#include "threads.h"

namespace fastscnn {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Calls run(task, scratch) for every task, in any order, each thread with scratch of its own.
template <class Run>
void for_each_task(int64_t tasks, int threads, size_t scratch_bytes, Run run) {
  scratch_bytes = whole_lines(scratch_bytes);
  threads = int(std::max<int64_t>(1, std::min<int64_t>(allowed_threads(threads), tasks)));
  void* memory = nullptr;
  if (posix_memalign(&memory, kLine, threads * scratch_bytes + kLine)) throw std::bad_alloc();
  const std::unique_ptr<void, Free> owner(memory);
  std::atomic<int64_t> next{0};
  run_team(threads, [&](const Team& team) {
    const Bump scratch{static_cast<char*>(memory) + team.rank * scratch_bytes};
    for (int64_t task; (task = next++) < tasks;) run(task, scratch);
  });
}

// Pixels per task of the passes over activations; fixed, so that sums do not depend on the threads.
constexpr size_t kPixels = 512;

template <class Run>
void for_each_pixels(size_t pixels, int threads, Run run) {
  for_each_task(int64_t((pixels + kPixels - 1) / kPixels), threads, 0, [&](int64_t task, Bump) {
    run(task, task * kPixels, std::min(pixels, (task + 1) * kPixels));
  });
}

// Runs part(begin, end, sums) over all pixels and adds up its two rows of `channels` in double.
template <class Part>
std::vector<double> sum_over_pixels(size_t pixels, int channels, int threads, Part part) {
  const size_t tasks = (pixels + kPixels - 1) / kPixels, width = 2 * size_t(channels);
  std::vector<float> parts(tasks * width);
  for_each_pixels(pixels, threads, [&](int64_t task, size_t begin, size_t end) {
    part(begin, end, parts.data() + task * width);
  });
  std::vector<double> sums(width, 0.0);
  for (size_t task = 0; task < tasks; task++)
    for (size_t c = 0; c < width; c++) sums[c] += parts[task * width + c];
  return sums;
}

// The mean of a few pixels: moments about it suffer no cancellation.
std::vector<float> near_mean(const TrainingKernels& k, const BatchNorm& n) {
  constexpr size_t kSamples = 32;
  std::vector<float> mean(n.channels), zero(n.channels), one(2 * size_t(n.channels));
  for (size_t i = 0; i < kSamples; i++) {
    const size_t pixel = i * n.pixels / kSamples;
    k.batch_norm_moments(n, zero.data(), pixel, pixel + 1, one.data());
    for (int c = 0; c < n.channels; c++) mean[c] += one[c] / kSamples;
  }
  return mean;
}

std::vector<float> scale_of(const BatchNorm& n) {
  std::vector<float> scale(n.channels);
  for (int c = 0; c < n.channels; c++) scale[c] = n.gamma[c] * n.inverse_std[c];
  return scale;
}

void require_channels(int channels) {
  require(channels >= kPanel && channels % kPanel == 0,
          "channels must be a multiple of 16, got " + std::to_string(channels));
}

}  // namespace

double upsampled_loss(const std::string& isa, const Loss& l, int threads) {
  const TrainingKernels& k = training_kernels_of(isa);
  require(l.classes >= 1 && l.classes <= kMaxClassesOfLabels,
          "classes must be 1 to 256, got " + std::to_string(l.classes));
  require(l.n >= 1 && l.h >= 1 && l.w >= 1 && l.height >= 1 && l.width >= 1,
          "logits and labels must be at least one of 1x1");
  std::vector<double> sums(l.n);
  const size_t bytes = k.loss(l, 0, sums.data(), Bump{});
  for_each_task(l.n, threads, bytes,
                [&](int64_t image, Bump scratch) { k.loss(l, int(image), &sums[image], scratch); });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

void batch_norm_forward(const std::string& isa, const BatchNorm& n, int threads) {
  const TrainingKernels& k = training_kernels_of(isa);
  require_channels(n.channels);
  require(n.pixels >= 2, "x must have more than one value per channel");
  const std::vector<float> shift = near_mean(k, n);
  const std::vector<double> sums =
      sum_over_pixels(n.pixels, n.channels, threads, [&](size_t begin, size_t end, float* part) {
        k.batch_norm_moments(n, shift.data(), begin, end, part);
      });
  for (int c = 0; c < n.channels; c++) {
    const double away = sums[c] / n.pixels;
    const double variance = std::max(sums[n.channels + c] / n.pixels - away * away, 0.0);
    n.mean[c] = float(shift[c] + away);
    n.inverse_std[c] = float(1 / std::sqrt(variance + n.epsilon));
    const double unbiased = variance * n.pixels / (n.pixels - 1);
    n.running_mean[c] =
        float((1 - n.momentum) * n.running_mean[c] + n.momentum * (shift[c] + away));
    n.running_variance[c] = float((1 - n.momentum) * n.running_variance[c] + n.momentum * unbiased);
  }
  const std::vector<float> scale = scale_of(n);
  for_each_pixels(n.pixels, threads, [&](int64_t, size_t begin, size_t end) {
    k.batch_norm_apply(n, scale.data(), begin, end);
  });
}

void batch_norm_backward(const std::string& isa, const BatchNorm& n, int threads) {
  const TrainingKernels& k = training_kernels_of(isa);
  require_channels(n.channels);
  const std::vector<float> scale = scale_of(n);
  const std::vector<double> sums =
      sum_over_pixels(n.pixels, n.channels, threads, [&](size_t begin, size_t end, float* part) {
        k.batch_norm_sums(n, scale.data(), begin, end, part);
      });
  // x_gradient = scale * (g - mean(g) - (x - mean) / std^2 * mean(g * (x - mean)))
  std::vector<float> slope(n.channels), constant(n.channels);
  for (int c = 0; c < n.channels; c++) {
    const double of_g = sums[c], of_product = sums[n.channels + c];
    n.beta_gradient[c] = float(of_g);
    n.gamma_gradient[c] = float(of_product * n.inverse_std[c]);
    const double precision = double(n.inverse_std[c]) * n.inverse_std[c];
    slope[c] = float(-scale[c] * precision * of_product / n.pixels);
    constant[c] = float(-scale[c] * of_g / n.pixels);
  }
  for_each_pixels(n.pixels, threads, [&](int64_t, size_t begin, size_t end) {
    k.batch_norm_gradient(n, scale.data(), slope.data(), constant.data(), begin, end);
  });
}

void depthwise_backward(const std::string& isa, const DepthwiseGradient& d, int threads) {
  const TrainingKernels& k = training_kernels_of(isa);
  require_channels(d.channels);
  require(d.h >= 1 && d.w >= 1, "x must be at least 1x1");
  require(d.stride == 1 || d.stride == 2, "stride must be 1 or 2, got " + std::to_string(d.stride));
  constexpr int kGroup = 64;  // channels per task
  const int groups = (d.channels + kGroup - 1) / kGroup;
  const size_t part = size_t(9) * d.channels;
  std::vector<float> parts(part * d.n);
  const size_t bytes = k.depthwise_backward(d, 0, 0, std::min(kGroup, d.channels), nullptr, Bump{});
  for_each_task(int64_t(d.n) * groups, threads, bytes, [&](int64_t task, Bump scratch) {
    const int image = int(task / groups), begin = int(task % groups) * kGroup;
    k.depthwise_backward(d, image, begin, std::min(begin + kGroup, d.channels),
                         parts.data() + image * part + size_t(9) * begin, scratch);
  });
  for (int k9 = 0; k9 < 9; k9++)
    for (int c = 0; c < d.channels; c++) {
      const int begin = c / kGroup * kGroup, width = std::min(kGroup, d.channels - begin);
      double sum = 0;
      for (int image = 0; image < d.n; image++)
        sum += parts[image * part + size_t(9) * begin + size_t(k9) * width + (c - begin)];
      d.weight_gradient[size_t(k9) * d.channels + c] = float(sum);
    }
}

}  // namespace fastscnn
