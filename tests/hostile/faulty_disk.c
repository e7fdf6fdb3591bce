/* A disk that fails: preloaded into a process, it stands in front of the calls that change files below a folder.

   Once armed, it counts these calls, and at the n-th
     FAIL  returns an error, and is a good disk again;
     FULL  returns an error, and for every later call that needs room, too;
     LOSE  ends the process, as a loss of power does. A log says what had been written and not flushed by then.

   Build: cc -shared -fPIC -o faulty_disk.so faulty_disk.c -ldl */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 1, FULL = 2, LOSE = 3 };

static char folder[PATH_MAX];
static int fatal_call, mode, calls, log_file = -1;

/* Whatever `path` is relative to, as the system would say it. */
static int below(int directory, const char *path) {
    char base[PATH_MAX] = "", place[64];
    if (path[0] != '/') {
        if (directory == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(place, sizeof place, "/proc/self/fd/%d", directory);
            ssize_t n = readlink(place, base, sizeof base - 1);
            base[n > 0 ? n : 0] = 0;
        }
        return !strncmp(base, folder, strlen(folder));
    }
    return !strncmp(path, folder, strlen(folder));
}

static int is_open_below(int descriptor) {
    char place[64], path[PATH_MAX];
    snprintf(place, sizeof place, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(place, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return !strncmp(path, folder, strlen(folder));
}

/* The next call: nonzero if it has to fail. */
static int fails(int needs_room) {
    calls++;
    if (mode == LOSE && calls == fatal_call) _exit(137);
    if ((mode == FAIL && calls == fatal_call) || (mode == FULL && calls >= fatal_call && needs_room)) {
        errno = needs_room ? ENOSPC : EIO;
        return 1;
    }
    return 0;
}

/* "W device inode": has been written to; "S device inode size": so much of it is on the disk. */
static void note(char what, int descriptor) {
    struct stat state;
    if (log_file >= 0 && !fstat(descriptor, &state))
        dprintf(log_file, "%c %lu %lld\n", what, (unsigned long)state.st_ino, (long long)state.st_size);
}

void arm(const char *where, int call, int how, int log) {
    snprintf(folder, sizeof folder, "%s/", where);
    fatal_call = call, mode = how, calls = 0, log_file = log;
}

int disarm(void) {
    folder[0] = 0;
    return calls;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define ARMED (folder[0])
#define WRITES (O_CREAT | O_WRONLY | O_RDWR)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t bits = va_arg(more, mode_t); va_end(more); \
        REAL(name); \
        if (ARMED && (flags & WRITES) && below(AT_FDCWD, path) && fails(flags & O_CREAT)) return -1; \
        return real(path, flags, bits); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t bits = va_arg(more, mode_t); va_end(more); \
        REAL(name); \
        if (ARMED && (flags & WRITES) && below(directory, path) && fails(flags & O_CREAT)) return -1; \
        return real(directory, path, flags, bits); \
    }
OPENAT(openat)
OPENAT(openat64)

#define WRITE(name, parameters, arguments) \
    ssize_t name parameters { \
        REAL(name); \
        if (!ARMED || !is_open_below(descriptor)) return real arguments; \
        if (fails(1)) return -1; \
        ssize_t written = real arguments; \
        note('W', descriptor); \
        return written; \
    }
WRITE(write, (int descriptor, const void *data, size_t size), (descriptor, data, size))
WRITE(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
WRITE(pwrite, (int descriptor, const void *data, size_t size, off_t place), (descriptor, data, size, place))
WRITE(pwrite64, (int descriptor, const void *data, size_t size, off64_t place), (descriptor, data, size, place))

#define SYNC(name) \
    int name(int descriptor) { \
        REAL(name); \
        if (!ARMED || !is_open_below(descriptor)) return real(descriptor); \
        if (fails(0)) return -1; \
        int result = real(descriptor); \
        note('S', descriptor); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

#define CHANGE(name, parameters, where, arguments, room) \
    int name parameters { \
        REAL(name); \
        if (ARMED && (where) && fails(room)) return -1; \
        return real arguments; \
    }
CHANGE(rename, (const char *from, const char *to), below(AT_FDCWD, to), (from, to), 0)
CHANGE(renameat, (int a, const char *from, int b, const char *to), below(b, to), (a, from, b, to), 0)
CHANGE(mkdir, (const char *path, mode_t bits), below(AT_FDCWD, path), (path, bits), 1)
CHANGE(unlink, (const char *path), below(AT_FDCWD, path), (path), 0)
CHANGE(unlinkat, (int directory, const char *path, int flags), below(directory, path), (directory, path, flags), 0)
CHANGE(rmdir, (const char *path), below(AT_FDCWD, path), (path), 0)
