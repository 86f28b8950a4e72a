/* One side of UCX's own read and write (ucp_get, ucp_put), without NIXL on top: a whole list is
 * posted, then the endpoint is flushed. Built on demand against the headers of the wheel
 * libucx-cu12; called by ctypes, so the interpreter's lock is not held. */
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucp/api/ucp.h>

struct side {
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_mem_h memory;
    ucp_ep_h peer;
    ucp_rkey_h key;
    void *packed_key;
    size_t packed_size;
    ucp_address_t *address;
    size_t address_size;
    atomic_int ending;
};

void side_close(struct side *side);

const char *side_text(int status) { return ucs_status_string((ucs_status_t)status); }

static ucs_status_t open_worker(struct side *side, int sleeps)
{
    ucp_params_t params = {
        .field_mask = UCP_PARAM_FIELD_FEATURES,
        .features = UCP_FEATURE_RMA | (sleeps ? UCP_FEATURE_WAKEUP : 0),
    };
    ucp_worker_params_t worker = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
        .thread_mode = UCS_THREAD_MODE_SERIALIZED,
    };
    ucp_config_t *config;
    ucs_status_t status = ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK)
        return status;
    status = ucp_init(&params, config, &side->context);
    ucp_config_release(config);
    if (status == UCS_OK)
        status = ucp_worker_create(side->context, &worker, &side->worker);
    return status;
}

static ucs_status_t map_memory(struct side *side, void *memory, size_t size)
{
    ucp_mem_map_params_t map = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        .address = memory,
        .length = size,
    };
    ucs_status_t status = ucp_mem_map(side->context, &map, &side->memory);
    if (status == UCS_OK)
        status = ucp_rkey_pack(side->context, side->memory, &side->packed_key, &side->packed_size);
    if (status == UCS_OK)
        status = ucp_worker_get_address(side->worker, &side->address, &side->address_size);
    return status;
}

/* A side with its memory registered; NULL, with a status that side_text explains. */
struct side *side_open(void *memory, size_t size, int sleeps, int *status)
{
    struct side *side = calloc(1, sizeof *side);
    *status = UCS_ERR_NO_MEMORY;
    if (!side)
        return NULL;
    *status = open_worker(side, sleeps);
    if (*status == UCS_OK)
        *status = map_memory(side, memory, size);
    if (*status == UCS_OK)
        return side;
    side_close(side);
    return NULL;
}

/* What an initiator needs: the worker's address (which = 0), the memory's key (which = 1). */
const void *side_blob(struct side *side, int which, size_t *size)
{
    *size = which ? side->packed_size : side->address_size;
    return which ? side->packed_key : (const void *)side->address;
}

int side_connect(struct side *side, const void *address, const void *key)
{
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
        .address = address,
        .err_mode = UCP_ERR_HANDLING_MODE_NONE, /* the other modes switch cma off */
    };
    ucs_status_t status = ucp_ep_create(side->worker, &params, &side->peer);
    return status == UCS_OK ? ucp_ep_rkey_unpack(side->peer, key, &side->key) : status;
}

static ucs_status_t finish(struct side *side, void *request)
{
    if (!UCS_PTR_IS_PTR(request))
        return UCS_PTR_RAW_STATUS(request);
    ucs_status_t status;
    while ((status = ucp_request_check_status(request)) == UCS_INPROGRESS)
        ucp_worker_progress(side->worker);
    ucp_request_free(request);
    return status;
}

/* Moves the list once. `requests` has room for `count` pointers. */
int side_move(struct side *side, int write, size_t count, const uint64_t *local,
              const uint64_t *remote, const uint64_t *lengths, void **requests)
{
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_MEMH, .memh = side->memory};
    ucp_request_param_t plain = {0};
    ucs_status_t worst = UCS_OK, status;
    for (size_t i = 0; i < count; i++) {
        void *at = (void *)(uintptr_t)local[i];
        requests[i] =
            write ? ucp_put_nbx(side->peer, at, lengths[i], remote[i], side->key, &param)
                  : ucp_get_nbx(side->peer, at, lengths[i], remote[i], side->key, &param);
    }
    status = finish(side, ucp_ep_flush_nbx(side->peer, &plain));
    if (status != UCS_OK)
        worst = status;
    for (size_t i = 0; i < count; i++)
        if ((status = finish(side, requests[i])) != UCS_OK)
            worst = status;
    return worst;
}

/* The target's thread: progress until side_end. Spins, or sleeps when there is nothing to do. */
int side_serve(struct side *side, int sleeps)
{
    ucs_status_t status = UCS_OK;
    while (!atomic_load_explicit(&side->ending, memory_order_relaxed)) {
        if (ucp_worker_progress(side->worker) || !sleeps)
            continue;
        status = ucp_worker_wait(side->worker);
        if (status != UCS_OK)
            break;
    }
    return status;
}

void side_end(struct side *side, int sleeps)
{
    atomic_store(&side->ending, 1);
    if (sleeps)
        ucp_worker_signal(side->worker);
}

/* Frees what there is. A peer is forgotten, not told: the processes end soon. */
void side_close(struct side *side)
{
    if (side->key)
        ucp_rkey_destroy(side->key);
    if (side->packed_key)
        ucp_rkey_buffer_release(side->packed_key);
    if (side->address)
        ucp_worker_release_address(side->worker, side->address);
    if (side->memory)
        ucp_mem_unmap(side->context, side->memory);
    if (side->worker)
        ucp_worker_destroy(side->worker);
    if (side->context)
        ucp_cleanup(side->context);
    free(side);
}
