// The whole network on one image. Depth-first row chains: picture -> stem -> dsconv -> dsconv, and
// resize -> fusion -> dsconv -> dsconv -> 1x1 -> result; in memory are only the 1/8 features, two
// 1/16 or smaller planes and the 1/32 features.
static size_t network(const Chain& chain, const Picture& picture, int image, Output output,
                      void* out, const Team& team, Reached* reached, Bump shared,
                      size_t* shared_bytes, Bump scratch) {
  const Layer &pyramid = chain.pyramid->layer, &fusion = chain.fusion->layer;
  const bool measuring = scratch.measuring();
  size_t most = 0;
  auto end_stage = [&](const char* name, int block = -1) {
    if (measuring) return;
    team.wait();
    if (reached && team.rank == 0) reached(name, block);
  };
  auto plane = [&](int channels, int h, int w) {
    return Plane{shared.take<element>(size_t(pixel_pitch(channels)) * h * w), h, w};
  };

  // Learning to downsample.
  StemRows stem(chain.stem->layer, chain.stem->weights, picture, image);
  DsconvRows<StemRows> first(chain.first->layer, chain.first->weights, stem, stem.width,
                             stem.height);
  DsconvRows<DsconvRows<StemRows>> second(chain.second->layer, chain.second->weights, first,
                                          first.width, first.height);
  const int high_channels = chain.second->layer.out;
  const Plane high = plane(high_channels, second.height, second.width);
  Bump rows = scratch;
  second.place(rows);
  most = largest(most, rows.used);
  if (!measuring) {
    const Tiles tiles;
    run_rows(second, high, pixel_pitch(high_channels), team);
  }
  end_stage("downsample");

  // Global features: blocks write to two planes in turn, of the largest size that any of them
  // needs.
  size_t largest_plane = 0;
  {
    int h = high.h, w = high.w;
    for (const Loaded* block = chain.blocks; block != chain.pyramid; block++) {
      const Layer& l = block->layer;
      h = l.output_size(h), w = l.output_size(w);
      largest_plane = largest(largest_plane, size_t(pixel_pitch(l.out)) * h * w);
    }
    largest_plane = largest(largest_plane, size_t(pixel_pitch(pyramid.out)) * h * w);
    largest_plane = largest(largest_plane, size_t(pixel_pitch(pyramid.in)) * h * w);
  }
  element* planes[2] = {shared.take<element>(largest_plane), shared.take<element>(largest_plane)};
  Plane x = high;
  int turn = 0;
  auto next_plane = [&](int h, int w) {
    turn ^= 1;
    return Plane{planes[turn], h, w};
  };
  for (const Loaded* block = chain.blocks; block != chain.pyramid; block++) {
    const Layer& l = block->layer;
    const Plane y = next_plane(l.output_size(x.h), l.output_size(x.w));
    most = largest(most, inverted_residual(l, block->weights, x, y, team, scratch));
    end_stage("block", int(block - chain.blocks));
    x = y;
  }
  Branch branches[kMaxBins];
  place_branches(pyramid, kType, shared, branches);
  const Plane features = next_plane(x.h, x.w);
  most = largest(
      most, pyramid_pooling(pyramid, chain.pyramid->weights, x, branches, features, team, scratch));
  end_stage("pyramid");

  // Feature fusion, classifier, and the rows of the result between each two of its rows.
  *shared_bytes = shared.used;
  FusionRows fused(fusion, chain.fusion->weights, high, features);
  DsconvRows<FusionRows> third(chain.head->layer, chain.head->weights, fused, high.w, high.h);
  struct Logits {
    DsconvRows<DsconvRows<FusionRows>> last;
    int pitch;
    float* logits;
    int halo() const { return last.halo(); }
    void start(int y) { last.start(y); }
    const float* row(int y) {
      last.row(y, logits);
      return logits;
    }
  } logits{{chain.tail->layer, chain.tail->weights, third, high.w, high.h}, 0, nullptr};
  logits.pitch = logits.last.last_pitch;
  UpsampleRows<Logits> full(chain.upsample->layer, logits, high.h, high.w, picture.h, picture.w,
                            output, out);
  rows = scratch;
  logits.last.place(rows);
  logits.logits = rows.take<float>(size_t(high.w) * logits.pitch);
  full.place(rows);
  most = largest(most, rows.used);
  if (measuring) return most;
  const Tiles tiles;
  logits.last.source.source.source.x =
      refine_dense(fusion, chain.fusion->weights, features, next_plane(x.h, x.w), team);
  full.run(team);
  if (reached) end_stage("classifier");
  return most;
}
