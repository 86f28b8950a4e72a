/* Looking for bytes for a moment before sleeping until they come.
 *
 * To be woken costs 21 us a round trip on a virtual machine, to look all the time 7.5 us. But who
 * looks takes a core from somebody: so it is brief, and after each try that found nothing twice as
 * many chances are left out. Where the core was taken away meanwhile, others want it: who sleeps is
 * let in at once when there is something to do, who looked has used up his share and waits. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <sys/resource.h>
#include <sys/socket.h>

enum {
    TAKEN_NS = 500000,   /* between two looks, each under 1 us: somebody else was on the core */
    LEAST_WARY = 256,    /* chances left out after that */
    MOST_WARY = 8192,
    MOST_LEFT_OUT = 256, /* chances: beside a slow peer, 0.2 us each of a wait of 50 or more */
};

static void found_nothing(struct spin *spin)
{
    spin->step = spin->step ? spin->step * 2 : 1;
    if (spin->step > MOST_LEFT_OUT)
        spin->step = MOST_LEFT_OUT;
    spin->skip = spin->step;
}

/* Was it this machine's scheduler who took the core away, since the last such gap? A hypervisor does
 * so too, and whoever sleeps then is not let in any sooner. */
static bool by_the_scheduler(struct spin *spin)
{
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    bool switched = usage.ru_nivcsw != spin->switches;
    spin->switches = usage.ru_nivcsw;
    return switched;
}

/* A core that is taken away after 4 ms of looking is taken away again: forget it slowly. */
static void was_taken(struct spin *spin)
{
    spin->wary = spin->wary < LEAST_WARY ? LEAST_WARY : spin->wary * 4;
    if (spin->wary > MOST_WARY)
        spin->wary = MOST_WARY;
    spin->skip = spin->wary;
}

int64_t receive_spinning(int fd, struct cursor *into, struct spin *spin, int64_t *budget)
{
    int64_t moved = receive_once(fd, into, MSG_DONTWAIT);
    if (moved != -EAGAIN)
        return moved;
    if (spin->skip) {
        spin->skip--;
        return -EAGAIN;
    }
    int64_t began = now_ns(), last = began;
    for (;;) {
        moved = receive_once(fd, into, MSG_DONTWAIT);
        int64_t now = now_ns();
        bool found = moved != -EAGAIN, late = now - began >= *budget;
        if (found || late) {
            *budget = late ? 0 : *budget - (now - began);
            if (now - last >= TAKEN_NS && by_the_scheduler(spin))
                was_taken(spin);
            else if (found)
                spin->step = 0, spin->wary -= (spin->wary + 63) / 64;
            else
                found_nothing(spin);
            return moved;
        }
        last = now;
    }
}
