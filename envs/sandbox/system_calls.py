"""The seccomp filter of the sandbox: an allow-list of system calls; all others are refused.

The list holds the calls that CPython and its standard library need, restricted to those whose kernel memory is bounded
by a limit of the sandbox: number of processes, address space and open files of each, size and number of files in /tmp.
Calls are left out if they allocate at the program's wish (extended attributes, file watches, shared memory, message
queues, keys, timers, asynchronous I/O, landlock rules), reach other processes, namespaces or mounts, or are rarely
used. If an argument decides, the filter reads it:

    clone           no new namespaces; clone3, whose flags are in memory, gets ENOSYS as on older kernels
    mmap, mremap    no shared anonymous memory, which stays allocated while one page of it is mapped; no fixed address
                    that would need a fifth level of page tables
    socketpair      Unix sockets only. Other sockets are refused: the backlog of a listening one is unbounded
    fcntl           no larger pipes, leases or notifications. Record locks succeed without effect, because the kernel
                    does not limit their number; flock works
    ...xattr        ENOTSUP, as on a file system without extended attributes
    ioctl, prctl    terminals, blocking and close-on-exec; names, parent-death signal and dumpable flag
"""

from __future__ import annotations

import errno
import os
import struct

Rule = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand: classic BPF

# AUDIT_ARCH constant, and column of the tables below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_FIRST_UNKNOWN = 452  # calls newer than these tables get ENOSYS, as on an older kernel

ALLOWED: dict[str, tuple[int, int | None]] = {
    # open files
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "lseek": (8, 62), "open": (2, None), "openat": (257, 56), "creat": (85, None), "close": (3, 57),
    "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "flock": (73, 32), "sendfile": (40, 71), "copy_file_range": (326, 285), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fadvise64": (221, 223), "umask": (95, 166),
    # names of files
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "statfs": (137, 43), "fstatfs": (138, 44),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "getdents": (78, None), "getdents64": (217, 61),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None), "readlinkat": (267, 78),
    "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    # memory
    "brk": (12, 214), "mprotect": (10, 226), "munmap": (11, 215), "madvise": (28, 233), "msync": (26, 227),
    # processes and threads
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "exit": (60, 93),
    "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "set_tid_address": (218, 96),
    "arch_prctl": (158, None), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "futex": (202, 98), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None),
    "getpgid": (121, 155), "setpgid": (109, 154), "getsid": (124, 156), "setsid": (112, 157), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "capget": (125, 90), "getrlimit": (97, 163),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "getrusage": (98, 165), "times": (100, 153),
    "getpriority": (140, 141), "setpriority": (141, 140), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_setaffinity": (203, 122), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "sched_rr_get_interval": (148, 127),
    "getcpu": (309, 168), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    # signals
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "restart_syscall": (219, 128), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    # time
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19),
    # the two ends of a socket pair
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "sendmmsg": (307, 269),
    "recvmmsg": (299, 243), "shutdown": (48, 210), "getsockopt": (55, 209), "getsockname": (51, 204),
    "getpeername": (52, 205),
    # the machine
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
}  # fmt: skip

# Calls decided by an argument, and calls refused with an error that programs can handle.
DECIDED = {
    "clone": (56, 220), "clone3": (435, 435), "mmap": (9, 222), "mremap": (25, 216), "socket": (41, 198),
    "socketpair": (53, 199), "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "getxattr": (191, 8), "lgetxattr": (192, 9),
    "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip

_ANY_NAMESPACE = 0x7E020080  # CLONE_NEWNS to CLONE_NEWNET, and CLONE_NEWTIME
_SHARED_ANONYMOUS = 0x01 | 0x20  # MAP_SHARED or MAP_SHARED_VALIDATE, and MAP_ANONYMOUS
_FIFTH_LEVEL = 1 << 16  # upper half of an address
_AF_UNIX = 1
_FCNTL = (
    0,
    1030,
    1,
    2,
    3,
    4,
    5,
    1032,
    1034,
)  # DUPFD (_CLOEXEC), GETFD, SETFD, GETFL, SETFL, GETLK, GETPIPE_SZ, GET_SEALS
_LOCKS = (6, 7, 37, 38)  # SETLK, SETLKW, OFD_SETLK, OFD_SETLKW
_IOCTL = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_PRCTL = (
    1,
    2,
    3,
    4,
    15,
    16,
    39,
    42,
)  # SET_ and GET_: PDEATHSIG, DUMPABLE, NAME; GET_: NO_NEW_PRIVS, THP_DISABLE

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW: Rule = (_ANSWER, 0, 0, 0x7FFF0000)
_KILL: Rule = (_ANSWER, 0, 0, 0x80000000)


def seccomp_filter() -> bytes:
    """The filter for this machine, as classic BPF over (number, architecture, arguments).

    Raises OSError for a machine without a table.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    architecture, column = _MACHINES[machine]
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), _KILL]
    rules += [(_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _FIRST_UNKNOWN), _refuse(errno.ENOSYS)]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            rules += [(_EQUAL, 0, 1, number), _ALLOW]
    for call, body in _decisions().items():
        rules += [(_EQUAL, 0, len(body), DECIDED[call][column]), *body]
    rules += [_refuse(errno.EPERM)]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


def _decisions() -> dict[str, list[Rule]]:
    """The rules per call. Each list ends with a return: reading an argument overwrites the call's number."""
    attributes = [call for call in DECIDED if call.endswith("xattr")]
    locks = [_argument(1), *_if_among(_LOCKS, _refuse(0))]
    return {
        "clone": [_argument(0), (_ANY_BIT, 0, 1, _ANY_NAMESPACE), _refuse(errno.EPERM), _ALLOW],
        "clone3": [_refuse(errno.ENOSYS)],
        "mmap": [
            _argument(3),
            (_AND, 0, 0, _SHARED_ANONYMOUS),
            *_if_among((_SHARED_ANONYMOUS,), _refuse(errno.EPERM)),
            *_unless_fifth_level(0),
        ],
        "mremap": _unless_fifth_level(4),
        "socket": [_refuse(errno.EAFNOSUPPORT)],
        "socketpair": [_argument(0), *_if_among((_AF_UNIX,), _ALLOW), _refuse(errno.EAFNOSUPPORT)],
        "fcntl": [*locks, *_if_among(_FCNTL, _ALLOW), _refuse(errno.EPERM)],
        "ioctl": [_argument(1), *_if_among(_IOCTL, _ALLOW), _refuse(errno.ENOTTY)],
        "prctl": [_argument(0), *_if_among(_PRCTL, _ALLOW), _refuse(errno.EPERM)],
        **{key: [_refuse(errno.ENOTSUP)] for key in attributes},
    }


def _argument(index: int, upper: bool = False) -> Rule:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * upper)


def _if_among(values: tuple[int, ...], answer: Rule) -> list[Rule]:
    """Return `answer` if the loaded value is among `values`, else continue."""
    last = len(values) - 1
    return [*((_EQUAL, last - at, int(at == last), value) for at, value in enumerate(values)), answer]


def _unless_fifth_level(address: int) -> list[Rule]:
    return [_argument(address, upper=True), (_AT_LEAST, 0, 1, _FIFTH_LEVEL), _refuse(errno.EPERM), _ALLOW]


def _refuse(number: int) -> Rule:
    return (_ANSWER, 0, 0, 0x00050000 | number)
