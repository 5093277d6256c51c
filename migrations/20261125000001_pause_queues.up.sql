-- Queues out of which nothing is taken, who said so and why; kept over restarts.
create table queue_pauses (
    queue text primary key,
    paused_by text not null,
    reason text,
    since timestamptz not null default now()
);
grant select, insert, update, delete on queue_pauses to capx_api, capx_system;
