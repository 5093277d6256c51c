-- Commits many attempts at steps in one statement: fence, job, run,
-- checkpoint and events, set-based. An attempt whose lease is gone matches
-- nothing here and so writes nothing anywhere. Locks go job first, then run,
-- as everywhere.
--
-- Each part hands on the whole row that it works on, so that nothing is joined
-- twice: without statistics of a batch the planner would loop over it for
-- every row of it. For the same reason events lie in three places of the row
-- and not in a table of their own.
--
-- Jobs and runs are looked up by `any (array[…])`, which can only be a lookup
-- for each row of the batch: by a plain `=` a plan that was made while the table
-- was tiny walks the whole index instead, and is kept when it holds millions.
with d as materialized (
    select *
    from unnest(
        $1::bigint[], $2::bigint[], $3::uuid[], $4::uuid[], $5::integer[],
        $6::text[], $7::text[], $8::integer[], $9::bigint[], $10::bigint[], $11::integer[], $12::smallint[],
        $13::text[], $14::text[], $15::text[], $16::text[], $17::bigint[],
        $18::text[], $19::uuid[], $20::integer[], $21::text[], $22::text[], $23::bigint[],
        $24::integer[],
        $25::uuid[], $26::text[], $27::text[],
        $28::uuid[], $29::text[], $30::text[],
        $31::uuid[], $32::text[], $33::text[], $36::bigint[]
    ) with ordinality as d (
        job_id, epoch, company_id, run_id, step,
        job_state, job_kind, next_step, delay_ms, timeout_ms, next_attempt, crash_count,
        run_status, waiting_on, run_output, run_error, cost_nanos,
        step_status, agent_id, attempt, output, error, duration_ms,
        event_count,
        event_1_id, event_1, data_1,
        event_2_id, event_2, data_2,
        event_3_id, event_3, data_3, bytes,
        place
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
        crash_count = d.crash_count,
        timeout_ms = d.timeout_ms,
        session_id = case when d.job_state = 'running' then j.session_id end,
        deadline_at = case
            when d.job_state = 'running'
                then clock_timestamp() + (d.timeout_ms + $34) * interval '1 millisecond'
        end
    from d
    where j.id = any (array[d.job_id]) and j.lease_epoch = d.epoch and j.session_id = $35
        and d.job_state is not null
    returning d.*
),
gone as (
    delete from jobs j
    using d
    where j.id = any (array[d.job_id]) and j.lease_epoch = d.epoch and j.session_id = $35
        and d.job_state is null
    returning d.*
),
run as (
    update runs r
    set event_seq = r.event_seq + d.event_count,
        cost_nanos = r.cost_nanos + d.cost_nanos,
        bytes = r.bytes + d.bytes,
        status = coalesce(d.run_status, r.status),
        waiting_on = d.waiting_on::jsonb,
        output = coalesce(d.run_output::jsonb, r.output),
        error = coalesce(d.run_error::jsonb, r.error),
        ended_at = case when d.run_status in ('completed', 'failed', 'cancelled') then clock_timestamp() end
    from (select * from moved union all select * from gone) d
    where r.id = any (array[d.run_id]) and r.company_id is not distinct from d.company_id and r.status = 'running'
    returning d.*, r.event_seq - d.event_count as seq, r.playbook_id, r.cost_nanos as run_cost_nanos, r.started_at, r.ended_at
),
checkpoint as (
    insert into run_steps as s (
        company_id, run_id, step, status, agent_id, attempt, job_id, lease_epoch,
        cost_nanos, output, bytes, error, started_at, ended_at
    )
    select company_id, run_id, step, step_status, agent_id, attempt, job_id, epoch,
        cost_nanos, output::jsonb, octet_length(output), error::jsonb,
        clock_timestamp() - duration_ms * interval '1 millisecond',
        case when step_status in ('completed', 'failed') then clock_timestamp() end
    from run
    where step_status is not null
    on conflict (company_id, run_id, step) do update
    set status = excluded.status,
        agent_id = excluded.agent_id,
        attempt = excluded.attempt,
        job_id = excluded.job_id,
        lease_epoch = excluded.lease_epoch,
        cost_nanos = s.cost_nanos + excluded.cost_nanos,
        -- In a loop, what the step has said the time before stays until it says
        -- something else.
        output = case when excluded.status in ('waiting', 'running') then s.output else excluded.output end,
        bytes = case when excluded.status in ('waiting', 'running') then s.bytes else excluded.bytes end,
        error = excluded.error,
        started_at = excluded.started_at,
        ended_at = excluded.ended_at
),
event as (
    insert into events (company_id, id, run_id, seq, event, data)
    select company_id, event_1_id, run_id, seq + 1, event_1, data_1::jsonb from run where event_1_id is not null
    union all
    select company_id, event_2_id, run_id, seq + 2, event_2, data_2::jsonb from run where event_2_id is not null
    union all
    select company_id, event_3_id, run_id, seq + 3, event_3, data_3::jsonb from run where event_3_id is not null
),
counted as (
    insert into run_deltas (company_id, playbook_id, started, ended, cost_nanos, duration_ms)
    select company_id, playbook_id, 0, count(*), sum(run_cost_nanos),
        sum(coalesce(extract(epoch from ended_at - started_at) * 1000, 0))::bigint
    from run
    where run_status in ('completed', 'failed', 'cancelled')
    group by company_id, playbook_id
),
spent as (
    insert into ledger (company_id, category, nanos, agent_id, run_id, step)
    select company_id, case when agent_id is null then 'tools' else 'inference' end, cost_nanos, agent_id, run_id, step
    from run
    where cost_nanos > 0
    returning company_id, at, category, nanos, agent_id
),
cost as (
    insert into cost_deltas (company_id, at, agent_id, category, nanos)
    select company_id, at, coalesce(agent_id, '00000000-0000-0000-0000-000000000000'), category, nanos from spent
)
select place as "place!" from run
