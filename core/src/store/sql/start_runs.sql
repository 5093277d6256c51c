-- Starts many runs in one statement: the run, its one job, what happened.
with d as materialized (
    select *
    from unnest(
        $1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::text[], $10::bigint[], $11::bigint[], $12::integer[]
    ) with ordinality as d (
        company_id, run_id, playbook_id, version_id, status, trigger, params, waiting_on,
        job_kind, delay_ms, timeout_ms, event_count, place
    )
),
job as (
    insert into jobs (queue, kind, company_id, ref_id, step, priority, state, due_at, timeout_ms)
    select 'steps', d.job_kind, d.company_id, d.run_id, 0, 0,
        case when d.delay_ms > 0 then 'scheduled' else 'ready' end,
        now() + d.delay_ms * interval '1 millisecond',
        d.timeout_ms
    from d
    returning id, ref_id
),
event as (
    insert into events (company_id, id, run_id, seq, event, data)
    select d.company_id, e.id, d.run_id, e.number, e.name, e.data::jsonb
    from unnest($13::bigint[], $14::integer[], $15::uuid[], $16::text[], $17::text[])
        as e (place, number, id, name, data)
    join d on d.place = e.place
)
insert into runs (
    company_id, id, playbook_id, version_id, job_id, status, trigger, params, waiting_on, event_seq, started_at
)
select d.company_id, d.run_id, d.playbook_id, d.version_id, job.id, d.status, d.trigger, d.params::jsonb,
    d.waiting_on::jsonb, d.event_count, clock_timestamp()
from d
join job on job.ref_id = d.run_id
returning id, job_id
