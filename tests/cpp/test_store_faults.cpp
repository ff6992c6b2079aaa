// Faults of the disk, of files and of readers, each by injection.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>

#include "store_rig.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;
using std::chrono::milliseconds;

namespace {

struct FaultRig : Rig {
  explicit FaultRig(const StoreOptions& options = {}) : Rig(4, 2, options) {}

  bool serves(int layer, int expert) {
    Ids ids = {expert}, slots = {-1};
    const ExpertLease lease = store->acquire(layer, ids, slots);
    return PackedExperts::holds(*store, layer, expert, slots[0]);
  }

  // The error of an acquire that must fail.
  ExpertReadError error(int layer, int expert) {
    try {
      serves(layer, expert);
    } catch (const ExpertReadError& e) {
      return e;
    }
    FAIL("an acquire that should fail did not");
    throw std::logic_error("unreachable");
  }

  void wait_for_failures(uint64_t n) {
    while (store->counters().failed_prefetches < n) std::this_thread::sleep_for(milliseconds(1));
  }
};

}  // namespace

TEST_CASE("short reads go on where they ended") {
  FaultRig rig;
  rig.disk->limit(7);
  CHECK(rig.serves(1, 5));
  CHECK(rig.disk->begun().size() > PackedExperts::kBytes / 7);
}

TEST_CASE("an interrupted read is tried again") {
  FaultRig rig;
  rig.disk->fail(1, 5, EINTR, 3);
  CHECK(rig.serves(1, 5));
  CHECK(rig.disk->begun().size() == 4);
  CHECK(rig.store->counters().failed_demands == 0);
}

TEST_CASE("a failed demand names layer, expert, file and offset, and a later call tries again") {
  FaultRig rig;
  rig.disk->fail(3, 5, EIO, 1);
  const ExpertReadError error = rig.error(3, 5);
  CHECK(error.failure().layer == 3);
  CHECK(error.failure().expert == 5);
  CHECK(error.failure().file == rig.packed.path(3).string());
  CHECK(error.failure().offset == 5 * PackedExperts::kBlock);
  CHECK(error.code().value() == EIO);
  CHECK(std::string(error.what())
            .find("[ExpertStore] layer 3, expert 5, " + rig.packed.path(3).string() + " at 40960: ") == 0);
  CHECK(rig.store->resident(3).empty());
  CHECK(rig.serves(3, 5));
  CHECK(rig.store->counters().failed_demands == 1);
  check_identities(rig.store->counters());
}

TEST_CASE("all who wait for an expert get its error, and keep no lease") {
  FaultRig rig;
  rig.disk->fail(1, 5, EIO, 1);
  rig.disk->shut();
  ExpertLease a = rig.store->request(1, Ids{5, 0});
  ExpertLease b = rig.store->request(1, Ids{1, 5});
  ExpertLease c = rig.store->request(1, Ids{0, 1});
  rig.disk->open();
  CHECK_THROWS_AS(a.wait(), ExpertReadError);
  CHECK_THROWS_AS(b.wait(), ExpertReadError);
  CHECK(c.wait());
  c.release();
  // With a lease left behind there would be no four slots.
  Ids ids = {2, 3, 4, 6}, slots(4);
  rig.store->acquire(1, ids, slots).release();
  a.release();
  b.release();
  CHECK(rig.serves(1, 5));
  check_identities(rig.store->counters());
}

TEST_CASE("two experts of one request that both fail leave nothing behind") {
  FaultRig rig;
  rig.disk->fail(1, 5, EIO, 1);
  rig.disk->fail(1, 6, EIO, 1);
  CHECK_THROWS_AS(rig.store->request(1, Ids{5, 6}).wait(), ExpertReadError);
  Ids ids = {2, 3, 4, 7}, slots(4);
  for (int i = 0; i < 3; ++i) {
    rig.store->acquire(1, ids, slots).release();
    CHECK((rig.serves(1, 5) && rig.serves(1, 6)));
  }
  CHECK(rig.store->counters().failed_demands == 2);
}

TEST_CASE("a failed prefetch is silent and counted") {
  FaultRig rig;
  rig.disk->fail(1, 5, EIO, 1);
  CHECK(rig.store->prefetch(1, Ids{5}, {}, 0) == 1);
  rig.wait_for_failures(1);
  CHECK(rig.store->resident(1).empty());
  const StoreCounters c = rig.store->counters();
  CHECK(c.wasted == 1);
  CHECK(c.wasted_bytes == 0);
  CHECK(c.pending == 0);
  check_identities(c);
  CHECK(rig.serves(1, 5));
}

TEST_CASE("a failed prefetch that somebody had joined raises there") {
  FaultRig rig;
  rig.disk->fail(1, 5, EIO, 1);
  rig.disk->shut();
  rig.store->prefetch(1, Ids{5}, {}, 0);
  rig.disk->wait_for_reads(1);
  ExpertLease lease = rig.store->request(1, Ids{5});
  rig.disk->open();
  CHECK_THROWS_AS(lease.wait(), ExpertReadError);
  const StoreCounters c = rig.store->counters();
  CHECK(c.failed_demands == 1);
  CHECK(c.failed_prefetches == 0);
  check_identities(c);
}

TEST_CASE("a file that is truncated, rewritten, replaced or removed is not served from") {
  const auto change = [](const char* how, const std::filesystem::path& path) {
    if (how[0] == 't') std::filesystem::resize_file(path, 3 * PackedExperts::kBlock);
    if (how[0] == 'w') std::fstream(path, std::ios::in | std::ios::out | std::ios::binary).seekp(100).put('x');
    if (how[0] == 'r') {
      std::filesystem::copy_file(path, path.string() + ".new");
      std::filesystem::rename(path.string() + ".new", path);
    }
    if (how[0] == 'd') std::filesystem::remove(path);
  };
  for (const char* how : {"truncated", "written", "replaced", "deleted"}) {
    CAPTURE(how);
    FaultRig rig;
    CHECK(rig.serves(1, 0));
    std::this_thread::sleep_for(milliseconds(20));  // the clock of file times is coarse
    change(how, rig.packed.path(1));
    CHECK(rig.error(1, 1).failure().layer == 1);
    CHECK(rig.error(1, 7).failure().file == rig.packed.path(1).string());
    CHECK(rig.serves(1, 0));  // what is resident stays
    CHECK(rig.serves(3, 7));  // of another file
  }
}

TEST_CASE("a checksum that differs is an error where it is asked for, and never served") {
  PackedExperts packed;
  std::fstream(packed.path(1), std::ios::in | std::ios::out | std::ios::binary)
      .seekp(2 * PackedExperts::kBlock + 1050)
      .put('x');
  StoreOptions options;
  options.capacity_bytes = 8 * PackedExperts::kBytes;
  options.reader.verify = true;
  ExpertStore store(packed.open(), options);
  Ids slots(1);
  try {
    store.acquire(1, Ids{2}, slots);
    FAIL("served");
  } catch (const ExpertReadError& error) {
    CHECK(error.code().value() == EBADMSG);
    CHECK(error.failure().expert == 2);
    CHECK(std::string(error.what()).find("its CRC-32C is ") != std::string::npos);
  }
  CHECK(store.resident(1).empty());
  store.acquire(1, Ids{3}, slots).release();
  CHECK(PackedExperts::holds(store, 1, 3, slots[0]));
}

TEST_CASE("a reader that throws anything lives on") {
  FaultRig rig;
  rig.disk->fail(1, 5, -1, 1);
  CHECK(std::string(rig.error(1, 5).what()).find("the disk fell off") != std::string::npos);
  CHECK(rig.serves(1, 5));

  PackedExperts packed;
  StoreOptions options;
  options.capacity_bytes = 8 * PackedExperts::kBytes;
  options.reader.preadv = [](int, const iovec*, int, off_t) -> ssize_t { throw 1; };
  ExpertStore store(packed.open(), options);
  Ids slots(1);
  for (int i = 0; i < 5; ++i) CHECK_THROWS_AS(store.acquire(1, Ids{i}, slots), ExpertReadError);
}

TEST_CASE("out of descriptors, opening for direct reads says so and leaves none behind") {
  PackedExperts packed;
  const auto file = packed.open();
  const int lowest = ::dup(0);
  ::close(lowest);
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(lowest + 1);  // one more, and two are needed
  REQUIRE(setrlimit(RLIMIT_NOFILE, &tight) == 0);
  StoreOptions options;
  options.capacity_bytes = 8 * PackedExperts::kBytes;
  options.reader.direct_io = true;
  std::optional<std::system_error> thrown;
  try {
    ExpertStore store(file, options);
  } catch (const std::system_error& error) {
    thrown = error;
  }
  setrlimit(RLIMIT_NOFILE, &before);
  const int again = ::dup(0);
  ::close(again);
  CHECK(again == lowest);
  REQUIRE(thrown);
  if (thrown->code().value() != EINVAL) CHECK(thrown->code().value() == EMFILE);
  CHECK(std::string(thrown->what()).find("[ExpertStore] opening ") == 0);
}

TEST_CASE("verify needs checksums, and capacity one token's experts") {
  PackedExperts packed;
  StoreOptions options;
  options.capacity_bytes = 8 * PackedExperts::kBytes;
  options.top_k = 5;
  CHECK_THROWS_WITH_AS(ExpertStore(packed.open(), options),
                       "[ExpertStore] capacity must be at least 60960 bytes, 5 of the experts of each layer; got 48768",
                       std::invalid_argument);
}

TEST_CASE("destroying a store with reads in flight waits for them, and wakes who waits") {
  FaultRig rig;
  rig.disk->shut();
  rig.store->prefetch(3, Ids{0, 1, 2}, {}, 0);
  ExpertLease lease = rig.store->request(1, Ids{0, 1, 2, 3});
  ExpertLease starved = rig.store->request(1, Ids{4});
  std::thread waiter([&] { CHECK_THROWS_WITH_AS(lease.wait(), "[ExpertStore] is closed", std::runtime_error); });
  rig.disk->wait_for_reads(2);
  std::thread destroyer([&] { rig.store.reset(); });
  waiter.join();
  rig.disk->open();
  destroyer.join();
  CHECK_THROWS_WITH_AS(starved.wait(), "[ExpertStore] is closed", std::runtime_error);
  lease.release();
}

TEST_CASE("a closed store refuses, and its leases can still be read from and released") {
  FaultRig rig;
  Ids ids = {6}, slots = {-1};
  ExpertLease lease = rig.store->acquire(1, ids, slots);
  rig.store->close();
  rig.store->close();
  CHECK(rig.store->closed());
  CHECK(PackedExperts::holds(*rig.store, 1, 6, slots[0]));
  CHECK_THROWS_WITH_AS(rig.serves(1, 6), "[ExpertStore] is closed", std::runtime_error);
  CHECK_THROWS_AS(rig.store->prefetch(1, ids, {}, 0), std::runtime_error);
  CHECK(rig.store->counters().lookups == 1);
  lease.release();
}

TEST_CASE("closing does not wait for a slow disk model") {
  StoreOptions options;
  options.reader.disk = DiskModel{1.0, milliseconds(0)};  // hours for an expert
  FaultRig rig(options);
  ExpertLease lease = rig.store->request(1, Ids{0});
  rig.disk->wait_for_reads(1);
  rig.store->close();
  CHECK(rig.store->closed());
}

#if !defined(__SANITIZE_THREAD__)
TEST_CASE("a child process after fork() is told, and does not hang") {
  FaultRig rig;
  rig.disk->shut();
  ExpertLease waits = rig.store->request(1, Ids{0});
  rig.disk->wait_for_reads(1);
  const pid_t child = fork();
  if (child == 0) {
    int told = 0;
    const auto tell = [&](auto call) {
      try {
        call();
      } catch (const std::runtime_error&) {
        ++told;
      }
    };
    Ids slots(1);
    tell([&] { rig.store->acquire(1, Ids{1}, slots); });
    tell([&] { rig.store->prefetch(1, Ids{2}, {}, 0); });
    tell([&] { waits.wait(); });
    tell([&] { rig.store->counters(); });
    waits.release();
    rig.store.reset();
    _exit(told == 4 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  rig.disk->open();
  CHECK(waits.wait());
}
#endif
