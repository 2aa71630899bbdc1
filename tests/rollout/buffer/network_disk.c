// A library for LD_PRELOAD: files below $NETWORK_DISK behave as on a network file system.
//   NETWORK_HOW   type: statfs says NFS | locks: they are refused | free: locks do not exclude each other | memory: it is not shared
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

static int how(const char *name) {
    const char *asked = getenv("NETWORK_HOW");
    return asked && strcmp(asked, name) == 0;
}

static int below(const char *path) {
    const char *disk = getenv("NETWORK_DISK");
    return disk && strncmp(path, disk, strlen(disk)) == 0;
}

static int on_disk(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int lock(int descriptor, int command) {
    if (!on_disk(descriptor)) return 1;
    int locks = command == F_SETLK || command == F_SETLKW || command == F_GETLK || command == F_OFD_SETLK;
    if (locks && how("locks")) { errno = ENOLCK; return -1; }
    return locks && how("free") ? 0 : 1;
}

#define FCNTL(name)                                                      \
    int name(int descriptor, int command, ...) {                         \
        va_list rest;                                                    \
        va_start(rest, command);                                         \
        void *argument = va_arg(rest, void *);                           \
        va_end(rest);                                                    \
        int said = lock(descriptor, command);                            \
        if (said <= 0) return said;                                      \
        int (*real)(int, int, ...) = dlsym(RTLD_NEXT, #name);            \
        return real(descriptor, command, argument);                      \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int flock(int descriptor, int operation) {
    int said = lock(descriptor, F_SETLK);
    if (said <= 0) return said;
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return real(descriptor, operation);
}

#define MMAP(name)                                                                              \
    void *name(void *address, size_t length, int protection, int flags, int fd, off_t offset) { \
        if (how("memory") && (flags & MAP_SHARED) && fd >= 0 && on_disk(fd)) {                  \
            errno = ENODEV;                                                                     \
            return MAP_FAILED;                                                                  \
        }                                                                                       \
        void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, #name);          \
        return real(address, length, protection, flags, fd, offset);                            \
    }
MMAP(mmap)
MMAP(mmap64)

int statfs(const char *path, struct statfs *found) {
    int (*real)(const char *, struct statfs *) = dlsym(RTLD_NEXT, "statfs");
    int said = real(path, found);
    if (said == 0 && how("type") && below(path)) found->f_type = 0x6969;
    return said;
}
