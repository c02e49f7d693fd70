// The whole network on one image. Depth-first row chains: picture -> stem -> dsconv -> dsconv, and
// resize -> fusion -> dsconv -> dsconv -> 1x1; in memory are only the 1/8 features, two 1/16 or
// smaller planes, the 1/32 features and the low-resolution logits.
static size_t network(const Layer* layers, const Weights* weights, int count,
                      const Picture& picture, int image, Output output, void* out, const Team& team,
                      Reached* reached, Bump shared, size_t* shared_bytes, Bump scratch) {
  const Layer *pyramid = layers + count - 5, *fusion = pyramid + 1, *head = fusion + 1,
              *tail = head + 1, *upsample = tail + 1;
  auto of = [&](const Layer* l) -> const Weights& { return weights[l - layers]; };
  const bool measuring = scratch.measuring();
  size_t most = 0;
  auto end_stage = [&](const char* name, int block = -1) {
    if (measuring) return;
    team.wait();
    if (reached && team.rank == 0) reached(name, block);
  };
  auto plane = [&](int channels, int h, int w) {
    return Plane{shared.take<element>(size_t(padded(channels)) * h * w), h, w};
  };

  // Learning to downsample.
  StemRows stem(layers[0], weights[0], picture, image);
  DsconvRows<StemRows> first(layers[1], weights[1], stem, stem.width, stem.height);
  DsconvRows<DsconvRows<StemRows>> second(layers[2], weights[2], first, first.width, first.height);
  const Plane high = plane(layers[2].out, second.height, second.width);
  Bump rows = scratch;
  second.place(rows);
  most = largest(most, rows.used);
  if (!measuring) {
    const Tiles tiles;
    run_rows(second, high, padded(layers[2].out), team);
  }
  end_stage("downsample");

  // Global features: blocks write to two planes in turn, of the largest size that any of them
  // needs.
  size_t largest_plane = 0;
  {
    int h = high.h, w = high.w;
    for (const Layer* l = layers + 3; l != pyramid; l++) {
      h = l->output_size(h), w = l->output_size(w);
      largest_plane = largest(largest_plane, size_t(padded(l->out)) * h * w);
    }
    largest_plane = largest(largest_plane, size_t(padded(pyramid->out)) * h * w);
    largest_plane = largest(largest_plane, size_t(padded(pyramid->in)) * h * w);
  }
  element* planes[2] = {shared.take<element>(largest_plane), shared.take<element>(largest_plane)};
  Plane x = high;
  int turn = 0;
  auto next_plane = [&](int h, int w) {
    turn ^= 1;
    return Plane{planes[turn], h, w};
  };
  for (const Layer* l = layers + 3; l != pyramid; l++) {
    const Plane y = next_plane(l->output_size(x.h), l->output_size(x.w));
    most = largest(most, inverted_residual(*l, of(l), x, y, team, scratch));
    end_stage("block", int(l - layers) - 3);
    x = y;
  }
  Branch branches[kMaxBins];
  place_branches(*pyramid, kType, shared, branches);
  const Plane features = next_plane(x.h, x.w);
  most =
      largest(most, pyramid_pooling(*pyramid, of(pyramid), x, branches, features, team, scratch));
  end_stage("pyramid");

  // Feature fusion and classifier.
  LowLogits low(tail->last, high.h, high.w, shared);
  *shared_bytes = shared.used;
  FusionRows fused(*fusion, of(fusion), high, features);
  DsconvRows<FusionRows> third(*head, of(head), fused, high.w, high.h);
  DsconvRows<DsconvRows<FusionRows>> last(*tail, of(tail), third, high.w, high.h);
  rows = scratch;
  last.place(rows);
  const int channels = of(tail).last.n;
  float* logits = rows.take<float>(size_t(high.w) * channels);
  most = largest(most, rows.used);
  if (!measuring) {
    const Tiles tiles;
    last.source.source.source.x =
        refine_dense(*fusion, of(fusion), features, next_plane(x.h, x.w), team);
    for_each_row(last, high.h, team, [&](int y) {
      last.row(y, logits);
      low.take_row(y, logits, channels);
    });
  }
  end_stage("classifier");

  Upsample full{upsample, &low, picture.h, picture.w, {}, nullptr};
  rows = scratch;
  full.place(rows, output);
  most = largest(most, rows.used);
  if (measuring) return most;
  full.run(output, out, team);
  if (reached) end_stage("output");
  return most;
}
