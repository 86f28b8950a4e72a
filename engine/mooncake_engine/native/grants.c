/* The grants that the serving loop honours, and who is served under each. Python's GrantTable keeps
 * it up to date: what is not here is not honoured here, and goes to Python. */

#include "native.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BUCKETS = 4096 }; /* a grant lives as long as one request's KV waits to be fetched */

struct grant {
    struct grant *next;
    struct grant_use *uses;
    bool live;
    unsigned revoking; /* threads that wait for `uses` to become empty */
    size_t bytes;
    uint8_t token[];
};

struct grants {
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t left;
    struct grant *buckets[BUCKETS];
};

EXPORT struct grants *mooncake_grants_new(void)
{
    struct grants *grants = calloc(1, sizeof *grants);
    if (grants) {
        pthread_mutex_init(&grants->lock, NULL);
        pthread_cond_init(&grants->left, NULL);
    }
    return grants;
}

EXPORT void mooncake_grants_free(struct grants *grants)
{
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct grant *grant = grants->buckets[i], *next; grant; grant = next) {
            next = grant->next;
            free(grant);
        }
    pthread_cond_destroy(&grants->left);
    pthread_mutex_destroy(&grants->lock);
    free(grants);
}

/* Where the pointer to the grant of this token is, or would be. */
static struct grant **place_of(struct grants *grants, const uint8_t *token, size_t bytes)
{
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ token[i]) * 1099511628211u;
    struct grant **place = &grants->buckets[hash % BUCKETS];
    while (*place && ((*place)->bytes != bytes || memcmp((*place)->token, token, bytes) != 0))
        place = &(*place)->next;
    return place;
}

EXPORT void mooncake_grants_add(struct grants *grants, const uint8_t *token, size_t bytes)
{
    pthread_mutex_lock(&grants->lock);
    struct grant **place = place_of(grants, token, bytes);
    if (!*place) {
        struct grant *grant = calloc(1, sizeof *grant + bytes);
        if (grant) { /* else it is not honoured here, so Python serves: slower, and right */
            grant->bytes = bytes;
            memcpy(grant->token, token, bytes);
            *place = grant;
        }
    }
    if (*place)
        (*place)->live = true;
    pthread_mutex_unlock(&grants->lock);
}

/* Honour it no more. Who is served under it is interrupted, and has left when this returns. */
EXPORT void mooncake_grants_revoke(struct grants *grants, const uint8_t *token, size_t bytes)
{
    pthread_mutex_lock(&grants->lock);
    struct grant *grant = *place_of(grants, token, bytes);
    if (grant) {
        grant->live = false;
        grant->revoking++;
        for (struct grant_use *use = grant->uses; use; use = use->next)
            shutdown(use->fd, SHUT_RDWR);
        while (grant->uses)
            pthread_cond_wait(&grants->left, &grants->lock);
        grant->revoking--;
        if (!grant->revoking && !grant->live) {
            *place_of(grants, token, bytes) = grant->next; /* looked up anew: others may have left */
            free(grant);
        }
    }
    pthread_mutex_unlock(&grants->lock);
}

/* Be served under the token until grants_leave. False: it is not honoured. */
bool grants_enter(struct grants *grants, struct grant_use *use, const uint8_t *token, size_t bytes)
{
    use->grant = NULL;
    if (!bytes)
        return true;
    pthread_mutex_lock(&grants->lock);
    struct grant *grant = *place_of(grants, token, bytes);
    bool permitted = grant && grant->live;
    if (permitted) {
        use->grant = grant;
        use->next = grant->uses;
        use->back = &grant->uses;
        if (use->next)
            use->next->back = &use->next;
        grant->uses = use;
    }
    pthread_mutex_unlock(&grants->lock);
    return permitted;
}

void grants_leave(struct grants *grants, struct grant_use *use)
{
    if (!use->grant)
        return;
    pthread_mutex_lock(&grants->lock);
    *use->back = use->next;
    if (use->next)
        use->next->back = use->back;
    if (!use->grant->live)
        pthread_cond_broadcast(&grants->left);
    pthread_mutex_unlock(&grants->lock);
}
