-- Starts many runs in one statement: the run, its one job, what happened. The
-- job's number is drawn first, so that the parts need no join.
with d as materialized (
    select d.*, nextval(pg_get_serial_sequence('jobs', 'id')) as job_id
    from unnest(
        $1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::text[], $10::bigint[], $11::bigint[], $12::integer[],
        $13::uuid[], $14::text[], $15::text[],
        $16::uuid[], $17::text[], $18::text[],
        $19::uuid[], $20::text[], $21::text[],
        $22::integer[], $23::uuid[], $24::text[], $25::smallint[]
    ) as d (
        company_id, run_id, playbook_id, version_id, status, trigger, params, waiting_on,
        job_kind, delay_ms, timeout_ms, event_count,
        event_1_id, event_1, data_1,
        event_2_id, event_2, data_2,
        event_3_id, event_3, data_3,
        first_step, replay_of, dedup_key, priority
    )
),
job as (
    insert into jobs (id, queue, kind, company_id, ref_id, step, priority, state, due_at, timeout_ms)
    overriding system value
    select job_id, 'steps', job_kind, company_id, run_id, first_step, priority,
        case when delay_ms > 0 then 'scheduled' else 'ready' end,
        now() + delay_ms * interval '1 millisecond',
        timeout_ms
    from d
),
event as (
    -- Run by run, so that the indexes grow at their ends.
    insert into events (company_id, id, run_id, seq, event, data)
    select d.company_id, e.id, d.run_id, e.seq, e.event, e.data::jsonb
    from d
    cross join lateral (
        values (1, event_1_id, event_1, data_1), (2, event_2_id, event_2, data_2), (3, event_3_id, event_3, data_3)
    ) as e (seq, id, event, data)
    where e.id is not null
),
counted as (
    insert into run_deltas (company_id, playbook_id, started, ended, cost_nanos, duration_ms, last_run_at)
    select company_id, playbook_id, count(*), 0, 0, 0, clock_timestamp() from d group by company_id, playbook_id
)
insert into runs (
    company_id, id, playbook_id, version_id, job_id, status, trigger, params, waiting_on, event_seq, started_at, replay_of,
    dedup_key
)
select company_id, run_id, playbook_id, version_id, job_id, status, trigger, params::jsonb, waiting_on::jsonb,
    event_count, clock_timestamp(), replay_of, dedup_key
from d
returning id, job_id, started_at as "started_at!"
