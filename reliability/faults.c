/* The N-th system call that touches what lies under a folder fails, or kills the process. Loaded by LD_PRELOAD. */
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
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 4096
static char root[PATH_MAX];
static const char *names[MOST];
static long seen, at;
static int error, armed;

/* From now on, count calls under `folder`; the `number`-th fails with `code`, or kills where that is 0; none if 0. */
void fault_arm(const char *folder, long number, int code) {
    snprintf(root, sizeof root, "%s", folder);
    seen = 0, at = number, error = code, armed = 1;
}
void fault_disarm(void) { armed = 0; }
long fault_count(void) { return seen; }
const char *fault_name(long number) { return names[number - 1]; }

static int under(const char *path) {
    size_t n = strlen(root);
    return path && strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int under_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return under(path);
}

static int under_at(int fd, const char *path) {
    return path && path[0] == '/' ? under(path) : fd != AT_FDCWD && under_fd(fd);
}

/* Whether this call is to fail: it is one that counts, and its turn has come. */
static int fails(const char *name, int counts) {
    if (!armed || !counts) return 0;
    if (seen < MOST) names[seen] = name;
    if (++seen != at) return 0;
    if (!error) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, counts, params, types, ...)      \
    type name params {                                    \
        if (fails(#name, counts)) return (type)-1;        \
        return REAL(type, name, types)(__VA_ARGS__);      \
    }
#define T(...) __VA_ARGS__

WRAP(ssize_t, write, under_fd(fd), (int fd, const void *data, size_t size), T(int, const void *, size_t), fd, data, size)
WRAP(ssize_t, writev, under_fd(fd), (int fd, const struct iovec *data, int n), T(int, const struct iovec *, int), fd, data, n)
WRAP(ssize_t, pwrite64, under_fd(fd), (int fd, const void *data, size_t size, off64_t to), T(int, const void *, size_t, off64_t), fd, data, size, to)
WRAP(int, fsync, under_fd(fd), (int fd), T(int), fd)
WRAP(int, fdatasync, under_fd(fd), (int fd), T(int), fd)
WRAP(int, ftruncate64, under_fd(fd), (int fd, off64_t size), T(int, off64_t), fd, size)
WRAP(int, rename, under(a) || under(b), (const char *a, const char *b), T(const char *, const char *), a, b)
WRAP(int, renameat, under_at(f, a) || under_at(g, b), (int f, const char *a, int g, const char *b), T(int, const char *, int, const char *), f, a, g, b)
WRAP(int, renameat2, under_at(f, a) || under_at(g, b), (int f, const char *a, int g, const char *b, unsigned how), T(int, const char *, int, const char *, unsigned), f, a, g, b, how)
WRAP(int, mkdir, under(path), (const char *path, mode_t mode), T(const char *, mode_t), path, mode)
WRAP(int, mkdirat, under_at(f, path), (int f, const char *path, mode_t mode), T(int, const char *, mode_t), f, path, mode)
WRAP(int, unlink, under(path), (const char *path), T(const char *), path)
WRAP(int, unlinkat, under_at(f, path), (int f, const char *path, int how), T(int, const char *, int), f, path, how)
WRAP(int, rmdir, under(path), (const char *path), T(const char *), path)
WRAP(int, chmod, under(path), (const char *path, mode_t mode), T(const char *, mode_t), path, mode)
WRAP(int, fchmodat, under_at(f, path), (int f, const char *path, mode_t mode, int how), T(int, const char *, mode_t, int), f, path, mode, how)

#define OPEN(name)                                                          \
    int name(const char *path, int how, ...) {                              \
        va_list rest;                                                       \
        va_start(rest, how);                                                \
        mode_t mode = va_arg(rest, mode_t);                                 \
        va_end(rest);                                                       \
        if (fails(#name, under(path))) return -1;                           \
        return REAL(int, name, const char *, int, ...)(path, how, mode);    \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                                \
    int name(int f, const char *path, int how, ...) {                               \
        va_list rest;                                                               \
        va_start(rest, how);                                                        \
        mode_t mode = va_arg(rest, mode_t);                                         \
        va_end(rest);                                                               \
        if (fails(#name, under_at(f, path))) return -1;                             \
        return REAL(int, name, int, const char *, int, ...)(f, path, how, mode);    \
    }
OPENAT(openat)
OPENAT(openat64)
