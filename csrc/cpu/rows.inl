// Rows of an activation that flow from the op that makes them to the op that needs them, without
// the whole activation ever being written.

constexpr int pixel_pitch(int channels) { return pixel_pitch(channels, kType); }
constexpr int kBlock = pixel_pitch(1);

template <class T = element>
FASTSCNN_INLINE T* row_of(const Plane& p, int y, int channels) {
  return static_cast<T*>(p.data) + size_t(y) * p.w * channels;
}

// The last few rows of an activation, each with `pad` zero pixels on both sides. Row y is in slot
// y % slots. Rows above and below the image do not exist: at() is null there.
struct Ring {
  element* rows;
  size_t pitch;  // elements per slot
  int slots, pad, channels, width, height;
  int next;  // first row not made yet

  // `surplus`: elements after a row that may be read.
  void place(Bump& scratch, int slots_, int pad_, int channels_, int width_, int height_,
             int surplus = 0) {
    slots = slots_, pad = pad_, channels = channels_, width = width_, height = height_;
    const size_t elements = size_t(width + 2 * pad) * channels + surplus;
    pitch = whole_lines(elements * sizeof(element)) / sizeof(element);
    rows = scratch.take<element>(pitch * slots);
  }
  element* slot(int y) const { return rows + pitch * (y % slots) + pad * channels; }
  const element* at(int y) const { return y < 0 || y >= height ? nullptr : slot(y); }
  void start(int first) {
    next = max_of(first, 0);
    for (int y = 0; y < slots; y++) {
      element* row = slot(y);
      for (int i = 0; i < pad * channels; i++)
        row[i - pad * channels] = row[size_t(width) * channels + i] = 0;
    }
  }
  // Makes all rows up to and including `last` that exist.
  template <class Source>
  FASTSCNN_INLINE void pull(Source& source, int last) {
    for (; next <= min_of(last, height - 1); next++) source.row(next, slot(next));
  }
};

struct Range {
  int begin, end;
  int size() const { return end - begin; }
};
FASTSCNN_INLINE Range share(int n, const Team& team) {
  return {int(int64_t(n) * team.rank / team.size), int(int64_t(n) * (team.rank + 1) / team.size)};
}

// The rows of one stage, taken one at a time: first those of the thread's own share, from the
// front; then half of what is left to the thread that has most, where that is worth the `halo` of
// rows that must be made anew. Between two stages the team waits.
struct Rows {
  const Team& team;
  int height, halo;
  unsigned stage;

  Rows(int height_, int halo_, const Team& team_)
      : team(team_), height(height_), halo(halo_), stage(++team_.stage & 0xFFFF) {}

  static uint64_t word(unsigned stage, Range r) {
    return uint64_t(stage) << 48 | uint64_t(r.begin) << 24 | uint64_t(r.end);
  }
  // What is left to a thread. A share of an earlier stage is one that its thread has not begun.
  Range left(uint64_t rows, int rank) const {
    if (rows >> 48 == stage) return {int(rows >> 24 & 0xFFFFFF), int(rows & 0xFFFFFF)};
    return share(height, Team{rank, team.size, nullptr});
  }
  FASTSCNN_INLINE static uint64_t read(const Share& s) {
    return __atomic_load_n(&s.rows, __ATOMIC_ACQUIRE);
  }
  FASTSCNN_INLINE bool swap(Share& s, uint64_t& was, Range now) const {
    return __atomic_compare_exchange_n(&s.rows, &was, word(stage, now), false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
  }

  // The next row, or -1.
  int take() {
    Share& own = team.shares[team.rank];
    uint64_t rows = read(own);
    for (;;) {
      const Range r = left(rows, team.rank);
      if (r.begin >= r.end) break;
      if (swap(own, rows, {r.begin + 1, r.end})) return r.begin;
    }
    return steal(own);
  }
  int steal(Share& own) {
    for (;;) {
      int victim = -1, most = 2 * halo + 1;
      uint64_t rows = 0;
      for (int rank = 0; rank < team.size; rank++) {
        const uint64_t seen = read(team.shares[rank]);
        const int size = left(seen, rank).size();
        if (rank != team.rank && size > most) victim = rank, most = size, rows = seen;
      }
      if (victim < 0) return -1;
      const Range r = left(rows, victim);
      const int middle = r.begin + (r.size() + 1) / 2;
      if (!swap(team.shares[victim], rows, {r.begin, middle})) continue;
      // Nobody but this thread changes an empty share of its own.
      __atomic_store_n(&own.rows, word(stage, {middle + 1, r.end}), __ATOMIC_RELEASE);
      return middle;
    }
  }
};

// Runs a stage over this thread's rows: done(y) where a row goes to, or null to leave it there.
template <class Stage, class Row>
FASTSCNN_INLINE void for_each_row(Stage& stage, int height, const Team& team, Row row) {
  Rows rows(height, stage.halo(), team);
  for (int y, next = -1; (y = rows.take()) >= 0; next = y + 1) {
    if (y != next) stage.start(y);
    row(y);
  }
}
template <class T = element, class Stage>
FASTSCNN_INLINE void run_rows(Stage& stage, Plane out, int channels, const Team& team) {
  for_each_row(stage, out.h, team, [&](int y) { stage.row(y, row_of<T>(out, y, channels)); });
}

// Source: rows of a dense activation, copied so that they gain their zero pixels.
struct CopyRows {
  Plane x;
  int channels;
  void place(Bump&) {}
  void start(int) {}
  int halo() const { return 0; }
  void row(int y, element* out) {
    __builtin_memcpy(out, row_of(x, y, channels), size_t(x.w) * channels * sizeof(element));
  }
};
