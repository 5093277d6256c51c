//! The promises of capx, tested through its doors: the queue and the engine
//! on a real Postgres with a database each, the API over HTTP, and whole
//! processes that are killed at named points.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test that cannot go on stops")]

mod agents;
mod api;
mod artifacts;
mod audit;
mod budgets;
mod calls;
mod cli;
mod client;
mod closing;
mod concurrency;
mod contract;
mod crash;
mod deaths;
mod deeds;
mod deliveries;
mod dev;
mod directives;
mod exports;
mod fan;
mod flow;
mod gates;
mod governance;
mod graph;
mod harness;
mod heartbeats;
mod hooks;
mod hostile;
mod house;
mod kills;
mod lists;
mod mcp;
mod ops;
mod outage;
mod playbooks;
mod process;
mod provider;
mod proxy;
mod queue;
mod receiver;
mod retries;
mod rooms;
mod rubric;
mod runs;
mod sandbox;
mod schedules;
mod secrets;
mod seeds;
mod ssrf;
mod streams;
mod tenancy;
mod triggers;
mod walk;
mod webhooks;
