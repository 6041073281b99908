# Every target does what it needs by itself; nothing has to be run before.
LAB := cargo run --quiet --package lab --

.PHONY: help setup build image krew demo lab-up lab-down test fuzz lint bench

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## Install what the lab needs (as root or by sudo; only what is missing)
	@$(LAB) setup

build: ## Build the plugin and the agent
	cargo build --workspace

image: setup ## Build the image of the agent
	@$(LAB) image

krew: ## Pack the plugin for this machine as a release does: archive, checksums, manifest for krew
	@$(LAB) krew

demo: setup ## Watch a three-node cluster get a virtual IP and lose a node
	@$(LAB) demo

lab-up: setup ## Start a three-node cluster to play with
	@$(LAB) up

lab-down: ## Stop the cluster and leave nothing behind
	@$(LAB) down

test: setup ## Run all tests, on real kernels and a real cluster
	@$(LAB) test

FUZZ := 10000000
fuzz: ## Feed every decoder ten million inputs (FUZZ=n: another number)
	CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true \
		PROPTEST_CASES=$(FUZZ) cargo test --release --target-dir target/fuzz --workspace --lib any_bytes

lint: ## Formatting, clippy, licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- --deny warnings
	@command -v cargo-deny > /dev/null || cargo install --locked --quiet cargo-deny
	cargo deny --log-level error check bans licenses sources

bench: setup ## Compare failover with keepalived; measure loss, lateness, the plugin, the dataplane, image and memory (BENCH=full: every case)
	@cargo bench --quiet --package lab --bench bench
