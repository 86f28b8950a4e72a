/* What the loops that measure this machine's limits share. No Python in them: they are loaded by
 * ctypes, whose calls run without the interpreter lock, so a busy interpreter does not slow them. */
#ifndef MOONCAKE_LIMITS_H
#define MOONCAKE_LIMITS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Does one part of a run; 0, or a negative errno. */
typedef int part_function(void *part);

/* The threads that move the parts of a run at the same time, one part each. */
struct team;

/* `parts` holds `size` pointers, kept by the team; part 0 is done by the thread that calls
 * limits_many, so a team of one starts no thread. NULL with errno when a thread cannot be had. */
struct team *limits_team(part_function *work, void *const *parts, size_t size);

/* `runs` runs one after the other; seconds[i] is what run i took, from before its first part was
 * begun to after its last was done. Returns 0, or the negative errno of the run that ended it. */
int limits_many(struct team *team, size_t runs, double *seconds);

/* Ends the threads. Frees neither the parts nor what they point to. */
void limits_disband(struct team *team);

#endif
