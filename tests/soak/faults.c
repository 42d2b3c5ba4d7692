/* Makes one writing call fail, for tests/soak/writes.py: preloaded into a process, it counts the calls that write below a
   folder and does what `kind` says at call number `at`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum kind { COUNT, NO_SPACE, IO_ERROR, SHORT, LOST, FULL, KILL };

enum call { WRITE, REMOVE, OTHER };

static char root[PATH_MAX];
static long at, calls[OTHER + 1], counted;
static enum kind kind;

void soak_arm(const char *folder, long number, int what) {
  snprintf(root, sizeof root, "%s", folder);
  at = number, kind = what, counted = 0;
  memset(calls, 0, sizeof calls);
}

/* Whether a fault of this kind can hit this call: only data are lost, and a full disk lets files be removed. */
static int hits(enum kind what, enum call call) {
  if (what == SHORT || what == LOST) return call == WRITE;
  return call != REMOVE || (what != NO_SPACE && what != FULL);
}

long soak_calls(int what) {
  long sum = 0;
  for (enum call call = WRITE; call <= OTHER; call++) sum += hits(what, call) ? calls[call] : 0;
  return sum;
}

static int below(const char *path) {
  return root[0] && path && strncmp(path, root, strlen(root)) == 0;
}

static int fd_below(int fd) {
  char link[64], path[PATH_MAX];
  if (!root[0] || fd < 3) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}

/* Whether this call fails, with errno set. */
static int strike(enum call call) {
  calls[call]++;
  if (!hits(kind, call)) return 0;
  counted++;
  if (!at || counted < at || (counted > at && kind != FULL)) return 0;
  switch (kind) {
  case KILL: raise(SIGKILL); return 0;
  case NO_SPACE: case FULL: errno = ENOSPC; return 1;
  case IO_ERROR: errno = EIO; return 1;
  default: return 0;
  }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
  if (fd_below(fd)) {
    if (strike(WRITE)) return -1;
    if (counted == at && kind == SHORT) size = (size + 1) / 2;
    if (counted == at && kind == LOST) return REAL(write)(fd, data, size / 2) < 0 ? -1 : (ssize_t)size;
  }
  return REAL(write)(fd, data, size);
}

int fsync(int fd) { return fd_below(fd) && strike(OTHER) ? -1 : REAL(fsync)(fd); }
int rename(const char *from, const char *to) { return below(to) && strike(OTHER) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return below(path) && strike(OTHER) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return below(path) && strike(REMOVE) ? -1 : REAL(unlink)(path); }

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    va_list more;                                                              \
    va_start(more, flags);                                                     \
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                  \
    va_end(more);                                                              \
    return WRITES(flags) && below(path) && strike(OTHER) ? -1 : REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
