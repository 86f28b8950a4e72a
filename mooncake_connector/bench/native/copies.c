/* What same-host transfers cannot beat: memcpy between two mappings of the same pages, and one
 * system call for each 1024 runs where the other process's memory is not mapped. */
#define _GNU_SOURCE
#include "limits.h"

#include <errno.h>
#include <string.h>

enum { RUNS_PER_CALL = 1024 }; /* the kernel's UIO_MAXIOV */

/* One thread's part: run i of `from` and of `to` have the same length. Either is the target's. */
struct copies {
    const struct iovec *to;
    const struct iovec *from;
    size_t count;
    int32_t pid;   /* of the target: process_vm; 0: its memory is mapped here */
    int32_t write; /* with a pid: `to` is the target's */
};

int limits_memcpy(void *part)
{
    const struct copies *copies = part;
    for (size_t i = 0; i < copies->count; i++)
        memcpy(copies->to[i].iov_base, copies->from[i].iov_base, copies->to[i].iov_len);
    return 0;
}

int limits_process_vm(void *part)
{
    const struct copies *copies = part;
    for (size_t at = 0; at < copies->count; at += RUNS_PER_CALL) {
        size_t left = copies->count - at;
        size_t count = left < RUNS_PER_CALL ? left : RUNS_PER_CALL;
        size_t wanted = 0;
        for (size_t i = at; i < at + count; i++)
            wanted += copies->to[i].iov_len;
        ssize_t moved = copies->write ? process_vm_writev(copies->pid, copies->from + at, count,
                                                          copies->to + at, count, 0)
                                      : process_vm_readv(copies->pid, copies->to + at, count,
                                                         copies->from + at, count, 0);
        if (moved < 0)
            return -errno;
        if ((size_t)moved != wanted) /* it stops at the first page that is not there */
            return -EFAULT;
    }
    return 0;
}
