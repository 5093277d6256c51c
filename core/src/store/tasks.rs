//! Tasks.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, AgentId, CompanyId, RunId, TaskId};
use crate::domain::money::Nanos;

/// A task to be.
#[derive(Debug)]
pub struct NewTask<'a> {
    /// Its id.
    pub task: TaskId,
    /// Whose.
    pub company: CompanyId,
    /// Who is to do it.
    pub agent: Option<AgentId>,
    /// In short.
    pub title: &'a str,
    /// In full.
    pub description: Option<&'a str>,
    /// `pending` or `pending_approval`.
    pub status: &'a str,
    /// How urgent.
    pub priority: &'a str,
    /// The client's own.
    pub metadata: &'a Value,
    /// What must be completed before.
    pub needs: &'a [TaskId],
    /// The agent that has made it.
    pub by: Option<AgentId>,
    /// The call that makes it.
    pub call: Option<&'a str>,
    /// The task in whose course it is made.
    pub parent: Option<TaskId>,
}

/// A task.
#[derive(Debug, Clone)]
pub struct TaskRow {
    /// Whose.
    pub company_id: Uuid,
    /// Which.
    pub id: Uuid,
    /// Who is to do it.
    pub agent_id: Option<Uuid>,
    /// In short.
    pub title: String,
    /// In full.
    pub description: Option<String>,
    /// Its status.
    pub status: String,
    /// How urgent.
    pub priority: String,
    /// The client's own.
    pub metadata: Value,
    /// What must be completed before.
    pub needs: Vec<Uuid>,
    /// The agent that has made it.
    pub created_by: Option<Uuid>,
    /// The task in whose course it was made.
    pub parent_id: Option<Uuid>,
    /// `pending`, `approved`, `rejected` or `cancelled`, where a person is asked.
    pub approval: Option<String>,
    /// What a person said when refusing it.
    pub feedback: Option<String>,
    /// When a person let it be done.
    pub approved_at: Option<DateTime<Utc>>,
    /// What came of it.
    pub result: Option<Value>,
    /// What went wrong.
    pub error: Option<Value>,
    /// The run that it came from.
    pub run_id: Option<Uuid>,
    /// What it has cost.
    pub cost_nanos: i64,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
}

impl TaskRow {
    /// Which.
    pub fn task(&self) -> TaskId {
        TaskId(self.id)
    }

    /// The run that it came from.
    pub fn run(&self) -> Option<RunId> {
        self.run_id.map(RunId)
    }

    /// What it has cost.
    pub fn cost(&self) -> Nanos {
        Nanos(self.cost_nanos)
    }
}

/// Stores a task.
pub async fn insert(tx: &mut PgConnection, new: &NewTask<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into tasks (company_id, id, agent_id, title, description, status, priority, metadata, approval, needs, created_by, call_key,
             parent_id, root_id)
         values ($1, $2, $3, $4, $5, $6, $7, $8, case when $6 = 'pending_approval' then 'pending' end, $9, $10, $11, $12,
             coalesce((select root_id from tasks where company_id = $1 and id = $12::uuid),
                 case when ($8::jsonb) ->> 'directive' = 'true' then $2::uuid end))",
        new.company.0,
        new.task.0,
        new.agent.map(|agent| agent.0),
        new.title,
        new.description,
        new.status,
        new.priority,
        new.metadata,
        &new.needs.iter().map(|task| task.0).collect::<Vec<_>>(),
        new.by.map(|agent| agent.0),
        new.call,
        new.parent.map(|task| task.0),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Whoever has least to do among a company's agents that work.
pub async fn least_busy_agent(tx: &mut PgConnection, company: CompanyId) -> Result<Option<AgentId>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select a.id from agents a
         where a.company_id = $1 and a.status in ('active', 'initializing')
         order by (select count(*) from tasks t
                   where t.company_id = $1 and t.agent_id = a.id
                       and t.status in ('pending', 'pending_approval', 'in_progress')), a.id
         limit 1",
        company.0,
    )
    .fetch_optional(tx)
    .await?
    .map(AgentId))
}

/// One task; locked, for a change.
pub async fn lock(tx: &mut PgConnection, company: CompanyId, task: TaskId) -> Result<Option<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        "select company_id, id, agent_id, title, description, status, priority, metadata, needs, created_by, parent_id, approval, feedback, approved_at, result,
                error, run_id, cost_nanos, created_at, updated_at, ended_at
         from tasks where company_id = $1 and id = $2 for update",
        company.0,
        task.0,
    )
    .fetch_optional(tx)
    .await?)
}

/// Some tasks that a person is asked about, by their companies and ids, in no
/// order.
pub async fn some(tx: &mut PgConnection, tasks: &[(CompanyId, TaskId)]) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        "select t.company_id, t.id, agent_id, title, description, status, priority, metadata, needs, created_by, parent_id, approval, feedback,
                approved_at, result, error, run_id, cost_nanos, created_at, updated_at, ended_at
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
         join tasks t on t.company_id = k.company_id and t.id = k.id
         where t.approval is not null",
        &tasks.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &tasks.iter().map(|(_, task)| task.0).collect::<Vec<_>>(),
    )
    .fetch_all(tx)
    .await?)
}

/// The company of a task that an account sees.
pub async fn company_of(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    task: TaskId,
) -> Result<Option<CompanyId>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select t.company_id from (select * from tasks where id = $1 offset 0) t
         join companies c on c.id = t.company_id
         where c.account_id = $2 and ($3::uuid is null or c.id = $3)",
        task.0,
        account.0,
        bound.map(|company| company.0),
    )
    .fetch_optional(tx)
    .await?
    .map(CompanyId))
}

/// What picks tasks out of a company.
#[derive(Debug, Clone, Copy, Default)]
pub struct TaskFilter<'a> {
    /// One.
    pub task: Option<TaskId>,
    /// By status.
    pub status: Option<&'a str>,
    /// Whose work.
    pub agent: Option<AgentId>,
    /// How urgent.
    pub priority: Option<&'a str>,
    /// Made at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Older than this one.
    pub before: Option<Uuid>,
}

/// A page of a company's tasks, newest first.
pub async fn list(
    tx: &mut PgConnection,
    company: CompanyId,
    filter: TaskFilter<'_>,
    limit: i64,
) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        "select company_id, id, agent_id, title, description, status, priority, metadata, needs, created_by, parent_id, approval, feedback, approved_at, result,
                error, run_id, cost_nanos, created_at, updated_at, ended_at
         from tasks
         where company_id = $1
             and ($2::uuid is null or id = $2)
             and ($3::text is null or status = $3)
             and ($4::uuid is null or agent_id = $4)
             and ($5::text is null or priority = $5)
             and ($6::timestamptz is null or created_at >= $6)
             -- What follows from that, for the order's index: ids name their time.
             and ($7::uuid is null or id >= $7)
             and ($8::uuid is null or id < $8)
         order by id desc
         limit $9",
        company.0,
        filter.task.map(|task| task.0),
        filter.status,
        filter.agent.map(|agent| agent.0),
        filter.priority,
        filter.since,
        filter.since.map(first_id_at),
        filter.before,
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// How far the clock of whoever made an id may be ahead of or behind the
/// database's, in seconds.
const CLOCKS_OFF_S: i64 = 3 * 3_600;

/// Before every id of what was made at a time or later.
fn first_id_at(at: DateTime<Utc>) -> Uuid {
    let seconds = at.timestamp().saturating_sub(CLOCKS_OFF_S).max(0).unsigned_abs();
    let mut id = *Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, seconds, 0)).as_bytes();
    // What follows the time is chance.
    id[6..].fill(0);
    Uuid::from_bytes(id)
}

/// Sets a task's status, decided under its lock.
pub async fn set_status(
    tx: &mut PgConnection,
    row: &TaskRow,
    status: &str,
    feedback: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update tasks t
         set status = $3, feedback = coalesce($4, feedback), updated_at = clock_timestamp(),
             approval = s.approval,
             approved_at = case when s.approval = 'approved' then coalesce(approved_at, clock_timestamp()) end,
             ended_at = case when s.over then clock_timestamp() end,
             error = case when s.over then error end,
             -- What is done anew is another run.
             run_id = case when $3 = 'pending' then null else run_id end,
             result = case when $3 = 'pending' then null else result end
         from (
             select $3 in ('completed', 'rejected', 'failed', 'cancelled') as over,
                 case when $6::text is null then null
                     when $5 <> 'pending_approval' and $3 <> 'pending_approval' then $6
                     else case $3 when 'pending' then 'approved' when 'pending_approval' then 'pending' else $3 end
                 end as approval
         ) s
         where company_id = $1 and id = $2 and status = $5",
        row.company_id,
        row.id,
        status,
        feedback,
        row.status,
        row.approval,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Changes of a task; what is left out stays.
#[derive(Debug, Default)]
pub struct TaskChanges<'a> {
    /// In short.
    pub title: Option<&'a str>,
    /// In full.
    pub description: Option<&'a str>,
    /// Who is to do it.
    pub agent: Option<AgentId>,
    /// How urgent.
    pub priority: Option<&'a str>,
    /// Merged.
    pub metadata: Option<Value>,
}

/// Changes what is given of a task that is locked.
pub async fn update(tx: &mut PgConnection, row: &TaskRow, changes: &TaskChanges<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "update tasks
         set title = coalesce($3, title), description = coalesce($4, description), agent_id = coalesce($5, agent_id),
             priority = coalesce($6, priority), metadata = metadata || coalesce($7::jsonb, '{}'::jsonb),
             updated_at = clock_timestamp()
         where company_id = $1 and id = $2",
        row.company_id,
        row.id,
        changes.title,
        changes.description,
        changes.agent.map(|agent| agent.0),
        changes.priority,
        changes.metadata,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The task that an agent begins next: the most urgent, then the oldest, of those that need
/// nothing any more.
pub async fn next(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<Option<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        "select company_id, id, agent_id, title, description, status, priority, metadata, needs, created_by, parent_id, approval, feedback,
                approved_at, result, error, run_id, cost_nanos, created_at, updated_at, ended_at
         from tasks t
         where company_id = $1 and agent_id = $2 and status = 'pending'
             and not exists (
                 select from unnest(t.needs) n (id)
                 join tasks needed on needed.company_id = t.company_id and needed.id = n.id
                 where needed.status <> 'completed'
             )
         order by case priority when 'critical' then 0 when 'high' then 1 when 'medium' then 2 else 3 end, id
         limit 1
         for update of t",
        company.0,
        agent.0,
    )
    .fetch_optional(tx)
    .await?)
}

/// How many tasks are settled at once.
pub const ENDED_MAX: i64 = 100;

/// Writes down of an agent's tasks whose runs have ended what came of them.
pub async fn settle(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        r#"with ended as (
               select t.id, r.status, r.output, r.error, r.cost_nanos
               from tasks t join runs r on r.company_id = t.company_id and r.id = t.run_id
               where t.company_id = $1 and t.agent_id = $2 and t.status = 'in_progress'
                   and r.status in ('completed', 'failed', 'cancelled')
               limit $3
               for update of t
           )
           update tasks t
           set status = e.status, result = e.output, error = case when e.status = 'failed' then e.error end,
               cost_nanos = t.cost_nanos + e.cost_nanos, updated_at = clock_timestamp(), ended_at = clock_timestamp()
           from ended e
           where t.company_id = $1 and t.id = e.id
           returning t.company_id, t.id, t.agent_id, t.title, t.description, t.status, t.priority, t.metadata, t.needs,
               t.created_by, t.parent_id, t.approval, t.feedback, t.approved_at, t.result, t.error, t.run_id, t.cost_nanos, t.created_at,
               t.updated_at, t.ended_at"#,
        company.0,
        agent.0,
        ENDED_MAX,
    )
    .fetch_all(tx)
    .await?)
}

/// The results of tasks, for whoever needs them.
pub async fn results(
    tx: &mut PgConnection,
    company: CompanyId,
    tasks: &[Uuid],
) -> Result<Vec<(TaskId, String, Option<Value>)>, StoreError> {
    let rows = sqlx::query!(
        "select id, title, result from tasks where company_id = $1 and id = any ($2) order by id",
        company.0,
        tasks,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().map(|row| (TaskId(row.id), row.title, row.result)).collect())
}

/// The agents whose tasks wait for one.
pub async fn waiting_agents(
    tx: &mut PgConnection,
    company: CompanyId,
    task: TaskId,
) -> Result<Vec<AgentId>, StoreError> {
    let agents = sqlx::query_scalar!(
        r#"select distinct agent_id as "agent!" from tasks
           where company_id = $1 and needs @> array[$2::uuid] and status = 'pending' and agent_id is not null
           order by 1"#,
        company.0,
        task.0,
    )
    .fetch_all(tx)
    .await?;
    Ok(agents.into_iter().map(AgentId).collect())
}

/// An agent's tasks fail that need one which will not be completed.
pub async fn fail_hopeless(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        r#"update tasks t
           set status = 'failed', updated_at = clock_timestamp(), ended_at = clock_timestamp(),
               error = jsonb_build_object('code', 'invalid', 'message', 'a task that it needs is ' || lost.status)
           from (
               select distinct on (w.id) w.id, needed.status
               from tasks w
               cross join lateral unnest(w.needs) n (id)
               join tasks needed on needed.company_id = w.company_id and needed.id = n.id
               where w.company_id = $1 and w.agent_id = $2 and w.status = 'pending'
                   and needed.status in ('failed', 'rejected', 'cancelled')
           ) lost
           where t.company_id = $1 and t.id = lost.id and t.status = 'pending'
           returning t.company_id, t.id, t.agent_id, t.title, t.description, t.status, t.priority, t.metadata, t.needs,
               t.created_by, t.parent_id, t.approval, t.feedback, t.approved_at, t.result, t.error, t.run_id, t.cost_nanos, t.created_at,
               t.updated_at, t.ended_at"#,
        company.0,
        agent.0,
    )
    .fetch_all(tx)
    .await?)
}

/// Gives an agent the tasks that nobody had, since there was nobody; says whether it has got
/// any.
pub async fn adopt(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update tasks set agent_id = $2, updated_at = clock_timestamp()
         where company_id = $1 and agent_id is null and status in ('pending', 'pending_approval')",
        company.0,
        agent.0,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Hands an agent's tasks that have not begun to another one; says whether there were any.
pub async fn hand_over(
    tx: &mut PgConnection,
    company: CompanyId,
    from: AgentId,
    to: Option<AgentId>,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update tasks set agent_id = $3, updated_at = clock_timestamp()
         where company_id = $1 and agent_id = $2 and status in ('pending', 'pending_approval')",
        company.0,
        from.0,
        to.map(|agent| agent.0),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// The task that a call has made, where it has.
pub async fn by_call(tx: &mut PgConnection, company: CompanyId, call: &str) -> Result<Option<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        "select company_id, id, agent_id, title, description, status, priority, metadata, needs, created_by, parent_id, approval,
                feedback, approved_at, result, error, run_id, cost_nanos, created_at, updated_at, ended_at
         from tasks where company_id = $1 and call_key = $2",
        company.0,
        call,
    )
    .fetch_optional(tx)
    .await?)
}

/// How many tasks are open that agents have made.
pub async fn open_by_agents(tx: &mut PgConnection, company: CompanyId) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from tasks
           where company_id = $1 and status in ('pending', 'pending_approval', 'in_progress') and created_by is not null"#,
        company.0,
    )
    .fetch_one(tx)
    .await?)
}

/// How the tasks stand that were made in the course of one.
pub async fn children(tx: &mut PgConnection, company: CompanyId, parent: TaskId) -> Result<Vec<TaskRow>, StoreError> {
    Ok(sqlx::query_as!(
        TaskRow,
        "select company_id, id, agent_id, title, description, status, priority, metadata, needs, created_by, parent_id, approval,
                feedback, approved_at, result, error, run_id, cost_nanos, created_at, updated_at, ended_at
         from tasks where company_id = $1 and parent_id = $2 order by id limit 500",
        company.0,
        parent.0,
    )
    .fetch_all(tx)
    .await?)
}

/// How much was spent for a directive.
pub async fn cost_of_root(tx: &mut PgConnection, company: CompanyId, root: TaskId) -> Result<Nanos, StoreError> {
    let nanos = sqlx::query_scalar!(
        r#"select coalesce(sum(cost_nanos), 0)::bigint as "nanos!" from tasks where company_id = $1 and root_id = $2"#,
        company.0,
        root.0,
    )
    .fetch_one(tx)
    .await?;
    Ok(Nanos(nanos))
}
