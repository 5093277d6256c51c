-- Commits many attempts at steps in one statement: fence, job, run,
-- checkpoint and events, set-based. An attempt whose lease is gone matches
-- nothing here and so writes nothing anywhere. Locks go job first, then run,
-- as everywhere.
with d as materialized (
    select *
    from unnest(
        $1::bigint[], $2::bigint[], $3::uuid[], $4::uuid[], $5::integer[],
        $6::text[], $7::text[], $8::integer[], $9::bigint[], $10::bigint[], $11::integer[], $12::boolean[],
        $13::text[], $14::text[], $15::text[], $16::text[], $17::bigint[],
        $18::text[], $19::uuid[], $20::integer[], $21::text[], $22::text[], $23::bigint[],
        $24::integer[]
    ) with ordinality as d (
        job_id, epoch, company_id, run_id, step,
        job_state, job_kind, next_step, delay_ms, timeout_ms, next_attempt, checkpointed,
        run_status, waiting_on, run_output, run_error, cost_nanos,
        step_status, agent_id, attempt, output, error, duration_ms,
        event_count, place
    )
),
moved as (
    update jobs j
    set state = d.job_state,
        kind = d.job_kind,
        step = d.next_step,
        due_at = now() + d.delay_ms * interval '1 millisecond',
        lease_epoch = j.lease_epoch + 1,
        attempt = d.next_attempt,
        crash_count = case when d.checkpointed then 0 else j.crash_count end,
        timeout_ms = d.timeout_ms,
        session_id = case when d.job_state = 'running' then j.session_id end,
        deadline_at = case
            when d.job_state = 'running'
                then clock_timestamp() + (d.timeout_ms + $30) * interval '1 millisecond'
        end
    from d
    where j.id = d.job_id and j.lease_epoch = d.epoch and d.job_state is not null
    returning d.place
),
gone as (
    delete from jobs j
    using d
    where j.id = d.job_id and j.lease_epoch = d.epoch and d.job_state is null
    returning d.place
),
held as materialized (
    select place from moved
    union all
    select place from gone
),
run as (
    update runs r
    set event_seq = r.event_seq + d.event_count,
        cost_nanos = r.cost_nanos + d.cost_nanos,
        status = coalesce(d.run_status, r.status),
        waiting_on = d.waiting_on::jsonb,
        output = coalesce(d.run_output::jsonb, r.output),
        error = coalesce(d.run_error::jsonb, r.error),
        ended_at = case when d.run_status in ('completed', 'failed') then clock_timestamp() end
    from held
    join d on d.place = held.place
    where r.company_id = d.company_id and r.id = d.run_id and r.status = 'running'
    returning d.place, r.event_seq - d.event_count as seq_before
),
checkpoint as (
    insert into run_steps as s (
        company_id, run_id, step, status, agent_id, attempt, job_id, lease_epoch,
        cost_nanos, output, error, started_at, ended_at
    )
    select d.company_id, d.run_id, d.step, d.step_status, d.agent_id, d.attempt, d.job_id, d.epoch,
        d.cost_nanos, d.output::jsonb, d.error::jsonb,
        clock_timestamp() - d.duration_ms * interval '1 millisecond',
        case when d.step_status in ('completed', 'failed') then clock_timestamp() end
    from run
    join d on d.place = run.place
    where d.step_status is not null
    on conflict (company_id, run_id, step) do update
    set status = excluded.status,
        agent_id = excluded.agent_id,
        attempt = excluded.attempt,
        job_id = excluded.job_id,
        lease_epoch = excluded.lease_epoch,
        cost_nanos = s.cost_nanos + excluded.cost_nanos,
        output = excluded.output,
        error = excluded.error,
        started_at = excluded.started_at,
        ended_at = excluded.ended_at
),
event as (
    insert into events (company_id, id, run_id, seq, event, data)
    select d.company_id, e.id, d.run_id, run.seq_before + e.number, e.name, e.data::jsonb
    from unnest($25::bigint[], $26::integer[], $27::uuid[], $28::text[], $29::text[])
        as e (place, number, id, name, data)
    join run on run.place = e.place
    join d on d.place = e.place
)
select place as "place!" from run
